"""What the Triton kernels of the row-wise ops share: rows seen as a matrix, and tiles chosen by the row's width.

A tile is ``ROWS`` rows by ``BLOCK`` columns. Both come from the width and the size of an element alone, never from
the number of rows: the kernels are batch-invariant. A warp's lanes take 16 bytes in one access and two to four such
accesses are in flight, as the memory of a GPU needs; narrow rows share a program.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops import triton_devices

TILE = 2048  # elements that a program of four warps takes
MAX_WIDTH = 32768  # of a row that has to be held at once
WIDE = 16384  # bytes; longer rows are walked in blocks by kernels that have more than one row to hold
# Of the GPU that stands for its architecture.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "interpreter": 2}


@dataclass(frozen=True)
class Tile:
    """``rows`` x ``block`` elements a program, by ``warps`` warps."""

    rows: int
    block: int
    warps: int

    def options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {"ROWS": self.rows, "BLOCK": self.block, "num_warps": self.warps, "num_stages": 1} | EXACT


# A product and a sum are rounded each on its own, as in the reference and on the CPU.
EXACT = {"enable_fp_fusion": False}


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (1 for 0)."""
    return 1 << max(n - 1, 0).bit_length()


def whole_row(width: int, itemsize: int = 2) -> Tile:
    """A tile that holds whole rows: for sums along a row. 32 bytes a lane and operand, while warps last."""
    block, size = power_of_2(width), TILE * 2 // max(itemsize, 2)
    return Tile(max(1, size // block), block, min(16, max(4, 4 * block // size)))


def block_of_row(itemsize: int) -> Tile:
    """A tile that walks a row of more than ``WIDE`` bytes."""
    return whole_row(4096, itemsize)


def part_of_row(width: int, itemsize: int = 2) -> Tile:
    """A tile of about 4 KiB an operand, of rows or of a part of one: for work on single elements."""
    size = TILE * 2 // max(itemsize, 2)
    block = min(power_of_2(width), size)
    return Tile(size // block, block, 4)


@triton.jit
def tile_of(rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows [ROWS, 1] as int64, columns [1, BLOCK], and which of the tile's elements there are."""
    across = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % across) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < width)


def matrix(op: str, x: Tensor) -> Tensor:
    """``x`` [..., N] as [rows, N] with unit stride along N; a copy only where its layout leaves no other way."""
    triton_devices.check_dtype(op, x.dtype)
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    flat = x.reshape(rows, width)
    return flat if width <= 1 or flat.stride(1) == 1 else flat.contiguous()


def held(op: str, x: Tensor) -> Tensor:
    """``matrix``, for a kernel that holds a row at once; ToolkitError for rows that are too long for it."""
    if x.shape[-1] > MAX_WIDTH:
        raise ToolkitError(f"Rows must have <= {MAX_WIDTH} elements in the Triton kernel of {op}, got {x.shape[-1]}.")
    return matrix(op, x)


def blocks(n: int, size: int) -> int:
    """How many blocks of ``size`` cover ``n``."""
    return -(-n // size)


def parts(rows: int, tile: Tile, x: Tensor) -> tuple[int, int]:
    """(programs, tiles each walks) for a sum over the rows of ``x``, in an order that the shape alone decides.

    As many programs as are resident at once, by the registers that they take: more would wait for a second round and
    write more partial sums. A narrow element leaves half of them, for its kernels fetch a tile ahead.
    """
    resident = max(1, (32 if x.itemsize > 2 else 16) // tile.warps)
    steps = max(1, blocks(rows, tile.rows * resident * MULTIPROCESSORS[triton_devices.architecture(x.device)]))
    return blocks(rows, tile.rows * steps), steps
