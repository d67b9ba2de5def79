"""Whether the height of a matrix tile changes the bits of a product on this device.

A GPU may use another matrix instruction for 16 rows than for one of 64 (on Hopper: mma.sync and wgmma).
If they agree bit for bit, decode may use low tiles and still return the training forward's log-probabilities.
"""

import torch
import triton
import triton.language as tl

HEIGHTS = (16, 32, 64, 128)


@triton.jit
def product(
    a,
    b,
    c,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    """c [rows, N] = a [rows, K] @ b [K, N] in float32, K in order of STEP."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    step = tl.arange(0, STEP)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for k in range(0, K, STEP):
        left = tl.load(a + row[:, None] * K + (k + step)[None, :], mask=(row < rows)[:, None], other=0.0)
        right = tl.load(b + (k + step)[:, None] * N + col[None, :])
        acc = tl.dot(left, right, acc, input_precision="ieee")
    tl.store(c + row[:, None] * N + col[None, :], acc, mask=(row < rows)[:, None])


def differing(dtype: torch.dtype, rows: int = 512, n: int = 512, k: int = 2048) -> dict[int, dict[str, float]]:
    """For every height: elements whose bits differ from height 64's, and the error against float64."""
    torch.manual_seed(3)
    a, b = (torch.randn(size, device="cuda").to(dtype) for size in ((rows, k), (k, n)))
    exact = a.double() @ b.double()
    made = {}
    for height in HEIGHTS:
        made[height] = torch.full((rows, n), float("nan"), device="cuda")
        product[(triton.cdiv(rows, height), n // 64)](
            a, b, made[height], rows, N=n, K=k, ROWS=height, COLS=64, STEP=32,
            num_warps=4, num_stages=2, enable_fp_fusion=False,
        )  # fmt: skip
    return {
        height: {
            "differing": int((value != made[64]).sum()),
            "of": rows * n,
            "error": float((value.double() - exact).norm() / exact.norm()),
        }
        for height, value in made.items()
    }
