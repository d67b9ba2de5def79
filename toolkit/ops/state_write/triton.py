"""Writing rows of state into their slots, in Triton: one pass over the rows, a program a tile of them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.triton_devices import FLOATS
from toolkit.ops.triton_rows import blocks, part_of_row, tile_of

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["count", "most"])
def state_write_copy(
    pool, rows, slots, count, most, stride_p, stride_ph, stride_r, stride_rh,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """pool[slots[t], h] = rows[t, h]; a slot that is not in the pool is left out."""
    row, column, inside = tile_of(count, HEADS * WIDTH, ROWS, BLOCK)
    head, channel = (column // WIDTH).to(tl.int64), column % WIDTH
    slot = tl.load(slots + row, mask=row < count, other=-1)
    kept = (slot >= 0) & (slot < most) & inside
    values = tl.load(rows + row * stride_r + head * stride_rh + channel, mask=kept, other=0)
    tl.store(pool + slot * stride_p + head * stride_ph + channel, values.to(pool.dtype.element_ty), mask=kept)


def state_write(pool: Tensor, rows: Tensor, slots: Tensor) -> None:
    """``toolkit::state_write``: pool [S, H, D] of unit stride along D, rows [T, H, D], slots [T] int64.

    A slot of S or more is skipped as a negative one is: nothing outside the pool is ever written, and there is no
    error without waiting for the device.
    """
    if pool.dim() != 3 or rows.dim() != 3 or pool.shape[1:] != rows.shape[1:]:
        raise ToolkitError(
            "pool [slots, heads, width] and rows [rows, heads, width] must have the same heads and width,"
            f" got {list(pool.shape)} and {list(rows.shape)}."
        )
    if slots.dtype != torch.int64 or slots.shape != rows.shape[:1]:
        raise ToolkitError(f"slots must be int64 [{rows.shape[0]}], got {slots.dtype} of shape {list(slots.shape)}.")
    if pool.shape[2] > 1 and pool.stride(2) != 1:
        raise ToolkitError(f"pool must have a contiguous last dimension, got strides {list(pool.stride())}.")
    if not rows.numel() or not pool.numel():
        return
    # Between these the kernel converts; others are converted before it.
    if rows.dtype != pool.dtype and not (rows.dtype in FLOATS and pool.dtype in FLOATS):
        rows = rows.to(pool.dtype)
    if rows.shape[2] > 1 and rows.stride(2) != 1:
        rows = rows.contiguous()
    if pool.dtype not in FLOATS and pool.itemsize in _BITS:  # copied as integers
        pool, rows = pool.view(_BITS[pool.itemsize]), rows.view(_BITS[pool.itemsize])
    heads, width = pool.shape[1:]
    if heads > 1 and pool.stride(1) == width and rows.stride(1) == width:  # a row lies in one piece
        heads, width = 1, heads * width
    tile = part_of_row(heads * width, max(pool.itemsize, rows.itemsize))
    state_write_copy[(blocks(rows.shape[0], tile.rows) * blocks(heads * width, tile.block),)](
        pool, rows, slots.contiguous(), rows.shape[0], pool.shape[0], pool.stride(0), pool.stride(1),
        rows.stride(0), rows.stride(1), HEADS=heads, WIDTH=width, **tile.options(),
    )  # fmt: skip
