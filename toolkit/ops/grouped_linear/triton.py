"""``grouped_linear`` in Triton: rows times the weights of their experts, by the tiles of the plan.

A program takes the rows of one tile of the plan and a tile of columns, and walks K as ``linear`` does: in ascending
steps of a fixed depth, one float32 accumulator, never split, so a row's bits depend on that row and its expert alone.
A tile's rows end where the next tile's begin, so the kernels take any height of the plan's tiles: their own height is
data (``tiles.py``), a taller tile is shared out to several programs, and another height costs speed alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops import triton_devices
from toolkit.ops.grouped_linear import tiles as table
from toolkit.ops.linear.triton import aligned_rows, grouped_tile, row_product
from toolkit.ops.tiles import GemmTile, TileTable


@triton.jit
def span_of(tiles, offsets, part, tile_count, steps, experts, ROWS: tl.constexpr):
    """(expert, first row, end) of one of the ``steps`` parts of a tile; no rows where there are none."""
    tile = part // steps
    expert = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1) + part % steps * ROWS
    end = tl.load(tiles + 2 * tile + 3, mask=tile + 1 < tile_count, other=0)
    return expert, first, tl.where(tile + 1 < tile_count, end, tl.load(offsets + experts))


@triton.jit
def source_rows(order, row, row_ok, SLOTS: tl.constexpr, GATHER: tl.constexpr):
    """Where the rows lie in what they are read from: at themselves, or with GATHER at their tokens."""
    if GATHER:
        return tl.load(order + row, mask=row_ok, other=0) // SLOTS
    return tl.where(row_ok, row, 0)


@triton.jit
def expert_product(
    x, weight, source, row_ok, column, outputs, depth, stride_x, stride_w,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """acc[r, c] = sum_k x[source[r], k] * weight[column[c], k], of TURNED weights weight[k, column[c]]."""
    if TURNED:
        k = tl.arange(0, DEPTH)
        x_tile = x + source[:, None] * stride_x + k[None, :]
        w_tile = weight + k.to(tl.int64)[:, None] * stride_w + column[None, :]
        column_ok = (column < outputs)[None, :]
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, depth, DEPTH):
            if EVEN:
                left = tl.load(x_tile, mask=row_ok[:, None], other=0.0)
                right = tl.load(w_tile, mask=column_ok, other=0.0)
            else:
                left = tl.load(x_tile, mask=row_ok[:, None] & (k < depth - start)[None, :], other=0.0)
                right = tl.load(w_tile, mask=(k < depth - start)[:, None] & column_ok, other=0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
            x_tile += DEPTH
            w_tile += DEPTH * stride_w
    else:
        acc = row_product(
            x, weight, source, row_ok, column.to(tl.int64), outputs, depth, stride_x, stride_w,
            ROWS, COLUMNS, DEPTH, EVEN,
        )  # fmt: skip
    return acc


@triton.jit
def clear_rest(y, offsets, part, parts, experts, rows, column, inside, outputs, ROWS: tl.constexpr):
    """Zeros in the rows of no expert, shared out to all parts: how many there are is known on the device alone."""
    first = tl.load(offsets + experts) + part.to(tl.int64) * ROWS
    for begin in range(first, rows, parts * ROWS):
        local = tl.arange(0, ROWS)
        zeros = tl.zeros([ROWS, column.shape[0]], y.dtype.element_ty)
        mask = (begin + local < rows)[:, None] & inside[None, :]
        tl.store(y + begin * outputs + (local[:, None] * outputs + column[None, :]), zeros, mask=mask)


@triton.jit(do_not_specialize=["tile_count", "steps", "rows"])
def grouped_forward(
    x, weight, bias, scores, y, order, offsets, tiles, tile_count, steps, experts, rows, outputs, depth,
    stride_x, stride_e, stride_w,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, BIASED: tl.constexpr, SCALED: tl.constexpr, GATHER: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """A tile of columns of y [rows, outputs] for a tile of the plan; SCALED takes the bias times a row's score."""
    parts = tile_count * steps
    part, column_tile = grouped_tile(tl.program_id(0), parts, tl.cdiv(outputs, COLUMNS), GROUP)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < outputs
    clear_rest(y, offsets, part, parts, experts, rows, column, inside, outputs, ROWS)
    expert, first, end = span_of(tiles, offsets, part, tile_count, steps, experts, ROWS)
    if first >= end:
        return
    local = tl.arange(0, ROWS)
    row = first + local
    row_ok = row < end
    source = source_rows(order, row, row_ok, SLOTS, GATHER)
    acc = expert_product(
        x, weight + expert * stride_e, source, row_ok, column, outputs, depth, stride_x, stride_w,
        ROWS, COLUMNS, DEPTH, EVEN, TURNED,
    )  # fmt: skip
    if BIASED:
        shift = tl.load(bias + expert * outputs + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if SCALED:
            slot = tl.load(order + row, mask=row_ok, other=0)
            shift = tl.load(scores + slot, mask=row_ok, other=0.0).to(tl.float32)[:, None] * shift
        acc += shift
    tl.store(
        y + first * outputs + (local[:, None] * outputs + column[None, :]),
        acc.to(y.dtype.element_ty), mask=row_ok[:, None] & inside[None, :],
    )  # fmt: skip


class Matrices(NamedTuple):
    """The experts' weights as kernels read them: ``values`` with unit stride along the last dimension.

    turned: [E, K, N] instead of [E, N, K].
    """

    values: Tensor
    turned: bool

    @classmethod
    def of(cls, weight: Tensor, turned: bool) -> "Matrices":
        """A copy only where neither dimension of ``weight`` has unit stride."""
        if weight.stride(2) == 1 or weight.shape[2] == 1:
            return cls(weight, turned)
        if weight.stride(1) == 1:
            return cls(weight.transpose(1, 2), not turned)
        return cls(weight.contiguous(), turned)

    @property
    def outputs(self) -> int:
        return self.values.shape[2 if self.turned else 1]

    @property
    def depth(self) -> int:
        return self.values.shape[1 if self.turned else 2]

    def size(self, kind: TileTable[GemmTile], x: Tensor) -> GemmTile:
        """The tile of a product with ``x``."""
        arch = triton_devices.architecture(x.device)
        return kind.find(arch, x.dtype, row_widths=(self.outputs, self.depth))


def steps_of(tiles: Tensor, rows: int, experts: int, height: int) -> int:
    """How many steps of ``height`` rows the tallest tile of a plan can have, by the plan's shapes alone.

    A plan has ``rows // its tile`` tiles, and one more for each expert with rows: one step, unless its tile is taller
    than ``height`` or the rows are so few that it may be.
    """
    whole = tiles.shape[0] - min(experts, rows)
    return triton.cdiv(rows // whole if whole else rows, height)


def product(
    x: Tensor, weight: Matrices, bias: Tensor | None, scores: Tensor | None, order: Tensor, offsets: Tensor,
    tiles: Tensor, slots: int, gather: bool,
) -> Tensor:  # fmt: skip
    """[R, N]: x [R, K], or [T, K] to ``gather`` from, times the rows' weights, plus bias, times ``scores`` if given."""
    flat, size = aligned_rows(x), weight.size(table.PRODUCT, x)
    outputs, depth, rows, experts = weight.outputs, weight.depth, order.numel(), weight.values.shape[0]
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if not y.numel() or not experts:
        return y.zero_()
    count, steps = tiles.shape[0], steps_of(tiles, rows, experts, size.rows)
    grouped_forward[(count * steps * triton.cdiv(outputs, size.columns),)](
        flat, weight.values, y if bias is None else bias.contiguous(), y if scores is None else scores.contiguous(),
        y, order, offsets, tiles, count, steps, experts, rows, outputs, depth,
        flat.stride(0), weight.values.stride(0), weight.values.stride(1),
        SLOTS=slots, ROWS=size.rows, COLUMNS=size.columns, DEPTH=size.depth, GROUP=size.group,
        EVEN=depth % size.depth == 0, BIASED=bias is not None, SCALED=scores is not None,
        GATHER=gather, TURNED=weight.turned,
        **size.options(),
    )  # fmt: skip
    return y


def grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor,
    gather: bool, transposed: bool,
) -> Tensor:  # fmt: skip
    """``toolkit::grouped_linear`` on a GPU (or on CPU tensors in Triton's interpreter).

    float32, bfloat16 or float16: IEEE products, one float32 sum over ascending steps of K, the bias last, one rounding.
    """
    triton_devices.check_dtype("grouped_linear", x.dtype)
    matrices = Matrices.of(weight, transposed)
    return product(x, matrices, bias, None, order, offsets, tiles, max(rows.shape[1], 1), gather)
