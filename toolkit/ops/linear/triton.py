"""``linear`` in Triton: y = x W^T + bias with one reduction order: batch-invariant.

A program owns a tile of outputs and walks K from 0 in steps of a fixed depth, adding into one float32
accumulator: K is never split, neither in the grid nor by a count. Which tile it is goes by the weight's shape,
never by the number of rows. Programs run through the tiles in groups of rows, so that the weights that a
group reads stay in L2 while it works.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from toolkit.errors import ToolkitError
from toolkit.ops import triton_devices
from toolkit.ops.linear import tiles
from toolkit.ops.tiles import ALIGNMENT


@triton.jit
def grouped_tile(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: column by column within a group of GROUP row tiles."""
    per_group = GROUP * column_tiles
    first = program // per_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    local = program % per_group
    return first + local % height, local // height


@triton.jit
def row_product(
    x, weight, row, row_ok, column, outputs, depth, stride_x, stride_w,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """acc[r, c] = sum_k x[row[r], k] * weight[column[c], k]: one float32 chain over ascending steps of k.

    EVEN says that depth is a whole number of DEPTH. Rows that are not ok are taken as zeros and columns past the end
    as the last one, which saves a mask: neither is to be stored.
    """
    k = tl.arange(0, DEPTH)
    x_tile = x + row[:, None] * stride_x + k[None, :]
    w_tile = weight + tl.minimum(column, outputs - 1)[None, :] * stride_w + k[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN:
            left = tl.load(x_tile, mask=row_ok[:, None], other=0.0)
            right = tl.load(w_tile)
        else:
            left = tl.load(x_tile, mask=row_ok[:, None] & (k < depth - start)[None, :], other=0.0)
            right = tl.load(w_tile, mask=(k < depth - start)[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        x_tile += DEPTH
        w_tile += DEPTH
    return acc


@triton.jit(do_not_specialize=["rows"])
def linear_forward(
    x, weight, bias, y, rows, outputs, depth, stride_x, stride_w,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """One tile [ROWS, COLUMNS] of y."""
    row_tile, column_tile = grouped_tile(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(outputs, COLUMNS), GROUP)
    row = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = column_tile.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, inside = row < rows, column < outputs
    acc = row_product(
        x, weight, row, row_ok, column, outputs, depth, stride_x, stride_w, ROWS, COLUMNS, DEPTH, EVEN
    )  # fmt: skip
    if BIASED:
        acc += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + row[:, None] * outputs + column[None, :],
        acc.to(y.dtype.element_ty), mask=row_ok[:, None] & inside[None, :],
    )  # fmt: skip


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` as [rows, width] with unit stride along the width, copied only where its layout leaves no other way.

    Where the width allows aligned rows they are aligned, so that a view at an odd offset costs a copy and not the
    tile that its width is meant for.
    """
    width = x.shape[-1]
    flat = x.reshape(-1, width) if width else x.new_empty(x.shape[:-1].numel(), 0)
    odd = flat.stride(0) % ALIGNMENT or flat.data_ptr() % 16
    if (flat.stride(-1) == 1 or width == 1) and not (odd and width % ALIGNMENT == 0 and flat.shape[0] > 1):
        return flat
    return flat.clone(memory_format=torch.contiguous_format)


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """One sentence for shapes and dtypes that the kernel does not take."""
    triton_devices.check_dtype("linear", x.dtype)
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        wrong = weight.dtype if bias is None else f"{weight.dtype} and {bias.dtype}"
        raise ToolkitError(f"linear: weight and bias must have the dtype of x, {x.dtype}, got {wrong}.")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ToolkitError(
            f"linear: x must be [..., K] and weight [N, K], got x {list(x.shape)} and weight {list(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ToolkitError(
            f"linear: bias must have shape [N] for weight {list(weight.shape)}, got bias {list(bias.shape)}."
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``toolkit::linear`` on a GPU (or on CPU tensors in Triton's interpreter).

    x [..., K], weight [N, K], bias [N] or None in float32, bfloat16 or float16. Products in IEEE precision, one
    float32 sum over ascending steps of K, the bias last, one rounding. Returns [..., N].
    """
    check(x, weight, bias)
    flat, matrix = aligned_rows(x), aligned_rows(weight)
    rows, (outputs, depth) = flat.shape[0], matrix.shape
    # No view: a model may write into what a projection returns, and autograd takes no views of a function's output.
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    if y.numel():
        size = tiles.find(x.device, x.dtype, outputs, depth, rows)
        linear_forward[(triton.cdiv(rows, size.rows) * triton.cdiv(outputs, size.columns),)](
            flat, matrix, matrix if bias is None else bias.contiguous(), y, rows, outputs, depth,
            flat.stride(0), matrix.stride(0),
            ROWS=size.rows, COLUMNS=size.columns, DEPTH=size.depth, GROUP=size.group,
            EVEN=depth % size.depth == 0, BIASED=bias is not None,
            **size.options(),
        )  # fmt: skip
    return y


def linear_group(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """``toolkit::linear_group``: one GEMM after another."""
    return [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
