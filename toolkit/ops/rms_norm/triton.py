"""RMS norm in Triton: one row a step, so a row's bits depend on that row alone.

y = x * rsqrt(mean(x²) + eps) * (offset + weight), computed in float32. A row is walked in blocks of a width
chosen by its length, never by the number of rows; contraction is pinned off.
"""

import torch
import triton
import triton.language as tl

from toolkit.errors import ToolkitError

# Rows that one program of the weight gradient sums in order; its partials are summed in order after it.
ROWS_PER_PARTIAL = 64
MAX_WIDTH = 32768


@triton.jit
def rms_norm_forward(
    x, weight, y, stride_x, eps, offset, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / WIDTH + eps)
    result = values * scale
    if WEIGHTED:
        result = result * (tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset)
    tl.store(y + row * WIDTH + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_grad(
    grad, x, weight, dx, partials, rows, stride_g, stride_x, eps, offset,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """dx of ROWS rows, and their part of the weight's gradient, both in row order."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    factor = tl.full([BLOCK], 1.0, tl.float32)
    if WEIGHTED:
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(part * ROWS, tl.minimum(part * ROWS + ROWS, rows)):
        values = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(grad + row * stride_g + column, mask=inside, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / WIDTH + eps)
        normed = values * scale
        total += upstream * normed
        upstream = upstream * factor
        mean = tl.sum(upstream * normed, 0) / WIDTH
        result = (upstream - normed * mean) * scale
        tl.store(dx + row * WIDTH + column, result.to(dx.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(partials + part * WIDTH + column, total, mask=inside)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` as [rows, N] with unit stride along N."""
    width = x.shape[-1]
    if width > MAX_WIDTH:
        raise ToolkitError(f"rms_norm got rows of {width} elements; its Triton kernel takes at most {MAX_WIDTH}.")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ToolkitError(f"rms_norm got dtype {x.dtype}; its Triton kernel takes float32, bfloat16 and float16.")
    flat = x.reshape(-1, width)
    return flat if flat.stride(-1) == 1 or width == 1 else flat.contiguous()


def _launch(width: int) -> dict[str, int]:
    """Block and warps from the row's length alone."""
    block = triton.next_power_of_2(max(width, 1))
    return {
        "WIDTH": width,
        "BLOCK": block,
        "num_warps": min(16, max(1, block // 512)),
        "num_stages": 1,
        "enable_fp_fusion": False,
    }


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float) -> torch.Tensor:
    """``toolkit::rms_norm``: x [..., N] in float32, bfloat16 or float16; computed in float32."""
    flat = _rows(x)
    y = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        rms_norm_forward[(flat.shape[0],)](
            flat, flat if weight is None else weight.contiguous(), y, flat.stride(0), eps, offset,
            WEIGHTED=weight is not None, **_launch(flat.shape[1]),
        )  # fmt: skip
    return y.view(x.shape)


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``toolkit::rms_norm_backward``: (dx [..., N], dweight [N], empty without a weight).

    dweight is summed over rows in blocks of ``ROWS_PER_PARTIAL`` in order, and the blocks by one reduction.
    """
    flat, upstream = _rows(x), _rows(grad)
    width = flat.shape[1]
    dx = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    parts = triton.cdiv(flat.shape[0], ROWS_PER_PARTIAL)
    partials = torch.empty(parts if weight is not None else 0, width, dtype=torch.float32, device=x.device)
    if dx.numel():
        rms_norm_grad[(parts,)](
            upstream, flat, flat if weight is None else weight.contiguous(), dx, partials, flat.shape[0],
            upstream.stride(0), flat.stride(0), eps, offset,
            ROWS=ROWS_PER_PARTIAL, WEIGHTED=weight is not None, **_launch(width),
        )  # fmt: skip
    dweight = partials.sum(0).to(weight.dtype) if weight is not None else x.new_empty(0)
    return dx.view(x.shape), dweight
