"""The grouped GEMM of the Triton MoE kernels: ``grouped_linear``, ``experts`` and their backwards share it.

A program owns a tile of columns for the rows of one tile of the dispatch plan and reduces over K as ``linear`` does:
in ascending steps of a fixed depth, one float32 accumulator, no split-K, so a row's bits depend on that row and its
expert alone. A plan tile ends where the next one begins, so the kernels take plan tiles of any height: their own height
is data (``tiles.py``), and a taller plan tile is split over several programs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops import triton_devices
from toolkit.ops.linear.triton import grouped_tile, row_product
from toolkit.ops.tiles import GemmTile, TileTable


@triton.jit
def span_of(tiles, offsets, part, tile_count, steps, experts, ROWS: tl.constexpr):
    """(expert, first row, end) of one of the ``steps`` parts of a plan tile; first >= end where it has no rows."""
    tile = part // steps
    expert = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1) + part % steps * ROWS
    end = tl.load(tiles + 2 * tile + 3, mask=tile + 1 < tile_count, other=0)
    return expert, first, tl.where(tile + 1 < tile_count, end, tl.load(offsets + experts))


@triton.jit
def tile_of_program(
    tiles, offsets, tile_count, steps, experts, column_tiles, ROWS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """(part of a plan tile, column tile, expert, first row, end) of this program."""
    part, column_tile = grouped_tile(tl.program_id(0), tile_count * steps, column_tiles, GROUP)
    expert, first, end = span_of(tiles, offsets, part, tile_count, steps, experts, ROWS)
    return part, column_tile, expert, first, end


@triton.jit
def source_rows(order, row, row_ok, TOP_K: tl.constexpr, GATHER: tl.constexpr):
    """The rows of the operand that plan rows read: themselves, or with GATHER their tokens."""
    if GATHER:
        return tl.load(order + row, mask=row_ok, other=0) // TOP_K
    return tl.where(row_ok, row, 0)


@triton.jit
def expert_matmul(
    x, weight, order, first, end, column, outputs, depth, stride_x, stride_w,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    GATHER: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(acc [ROWS, COLUMNS] float32, row index within the tile, plan row, whether the row exists), for the rows from
    ``first`` to ``end`` of one expert.

    acc[r, c] = sum_k x[source(r), k] * weight[column[c], k], of TRANSPOSED weights weight[k, column[c]].
    """
    local = tl.arange(0, ROWS)
    row = first + local
    row_ok = row < end
    source = source_rows(order, row, row_ok, TOP_K, GATHER)
    if TRANSPOSED:
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
    return acc, local, row, row_ok


@triton.jit
def clear_rest(y, offsets, part, parts, experts, rows, column, inside, outputs, ROWS: tl.constexpr):
    """Zeros in the rows of no expert, split over all parts: only the device knows how many there are."""
    first = tl.load(offsets + experts) + part.to(tl.int64) * ROWS
    for begin in range(first, rows, parts * ROWS):
        local = tl.arange(0, ROWS)
        zeros = tl.zeros([ROWS, column.shape[0]], y.dtype.element_ty)
        mask = (begin + local < rows)[:, None] & inside[None, :]
        tl.store(y + begin * outputs + (local[:, None] * outputs + column[None, :]), zeros, mask=mask)


class ExpertMatrices(NamedTuple):
    """The experts' weights as kernels read them, with unit stride along the last dimension.

    Fields:
        values: [E, N, K], or [E, K, N] where ``transposed``.
    """

    values: Tensor
    transposed: bool

    @classmethod
    def of(cls, weight: Tensor, transposed: bool) -> "ExpertMatrices":
        """A copy only where neither dimension of ``weight`` has unit stride."""
        if weight.stride(2) == 1 or weight.shape[2] == 1:
            return cls(weight, transposed)
        if weight.stride(1) == 1:
            return cls(weight.transpose(1, 2), not transposed)
        return cls(weight.contiguous(), transposed)

    @property
    def outputs(self) -> int:
        return self.values.shape[2 if self.transposed else 1]

    @property
    def depth(self) -> int:
        return self.values.shape[1 if self.transposed else 2]

    def tile(self, table: TileTable[GemmTile], x: Tensor) -> GemmTile:
        """The tile of a GEMM with ``x``."""
        arch = triton_devices.architecture(x.device)
        return table.find(arch, x.dtype, row_widths=(self.outputs, self.depth))


def steps_of(tiles: Tensor, rows: int, experts: int, height: int) -> int:
    """How many programs of ``height`` rows the tallest tile of a plan can need, by the plan's shapes alone.

    A plan has ``rows // its tile`` tiles, and one more for each expert with rows: one step, unless its tile is taller
    than ``height`` or there are so few rows that it may be.
    """
    whole = tiles.shape[0] - min(experts, rows)
    return -(-(rows // whole if whole else rows) // height)


def gemm_arguments(
    weight: ExpertMatrices, size: GemmTile, order: Tensor, offsets: Tensor, tiles: Tensor, top_k: int
) -> dict[str, Any]:
    """The keyword arguments that every grouped GEMM kernel is launched with: the plan, the weights' layout, the tile.

    The grid is ``tile_count * steps`` programs per tile of columns.
    """
    rows, experts = order.numel(), weight.values.shape[0]
    return {
        "weight": weight.values,
        "order": order,
        "offsets": offsets,
        "tiles": tiles,
        "tile_count": tiles.shape[0],
        "steps": steps_of(tiles, rows, experts, size.rows),
        "experts": experts,
        "rows": rows,
        "depth": weight.depth,
        "stride_e": weight.values.stride(0),
        "stride_w": weight.values.stride(1),
        "TOP_K": top_k,
        "ROWS": size.rows,
        "COLUMNS": size.columns,
        "DEPTH": size.depth,
        "GROUP": size.group,
        "EVEN": weight.depth % size.depth == 0,
        "TRANSPOSED": weight.transposed,
        **size.options(),
    }
