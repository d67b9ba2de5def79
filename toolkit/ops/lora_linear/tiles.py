"""Tiles of the Triton kernels of low-rank adapters, as data: by (architecture, element type), never by rows.

``rows``     rows of one adapter that a program takes
``ranks``    at most that many ranks at a time
``columns``  outputs of a program, of those that are as long as x or y
``depth``    the step along a long sum
``warps``, ``stages``   what Triton calls num_warps and num_stages
"""

from dataclasses import dataclass

import torch

from toolkit.ops.triton_devices import check_product

# A sum along K or N is cut into splits of that length, so that few rows keep many programs busy; splits are
# added in order.
SPLIT = 1024
# The step along a long sum where rows are not aligned: loads go element by element, and a longer step would spill.
UNALIGNED_DEPTH = 32
# Rows of an adapter that one program of a weight's gradient sums; its partials are added in order.
SUMMED_ROWS = 512


@dataclass(frozen=True)
class Tile:
    rows: int
    ranks: int
    columns: int
    depth: int
    warps: int
    stages: int


Table = dict[str, dict[int, Tile]]

# [rows, long] x [long, ranks]
SHRINK: Table = {
    "sm_80": {2: Tile(64, 64, 0, 64, 4, 3), 4: Tile(64, 32, 0, 32, 4, 2)},
    "sm_90": {2: Tile(64, 64, 0, 64, 4, 4), 4: Tile(64, 32, 0, 32, 4, 2)},
    "sm_100": {2: Tile(64, 64, 0, 64, 4, 4), 4: Tile(64, 32, 0, 32, 4, 2)},
    "gfx942": {2: Tile(64, 64, 0, 64, 4, 2), 4: Tile(64, 64, 0, 32, 4, 2)},
    "interpreter": {2: Tile(16, 16, 0, 64, 1, 1), 4: Tile(16, 16, 0, 64, 1, 1)},
}

# [rows, ranks] x [ranks, columns]
EXPAND: Table = {
    "sm_80": {2: Tile(64, 16, 128, 0, 8, 1), 4: Tile(64, 16, 64, 0, 8, 1)},
    "sm_90": {2: Tile(64, 32, 128, 0, 8, 1), 4: Tile(64, 16, 64, 0, 8, 1)},
    "sm_100": {2: Tile(64, 32, 128, 0, 8, 1), 4: Tile(64, 16, 64, 0, 8, 1)},
    "gfx942": {2: Tile(64, 32, 128, 0, 4, 1), 4: Tile(64, 16, 64, 0, 4, 1)},
    "interpreter": {2: Tile(16, 16, 32, 0, 1, 1), 4: Tile(16, 16, 32, 0, 1, 1)},
}

# [ranks, rows] x [rows, columns], in steps of ``rows``
OUTER: Table = {
    "sm_80": {2: Tile(32, 64, 64, 0, 4, 2), 4: Tile(16, 32, 64, 0, 4, 2)},
    "sm_90": {2: Tile(32, 64, 64, 0, 4, 2), 4: Tile(16, 32, 64, 0, 4, 2)},
    "sm_100": {2: Tile(32, 64, 64, 0, 4, 2), 4: Tile(16, 32, 64, 0, 4, 2)},
    "gfx942": {2: Tile(32, 64, 64, 0, 4, 2), 4: Tile(16, 32, 64, 0, 4, 2)},
    "interpreter": {2: Tile(16, 16, 32, 0, 1, 1), 4: Tile(16, 16, 32, 0, 1, 1)},
}


def tile(table: Table, arch: str, dtype: torch.dtype) -> Tile:
    """The tile for an architecture and an element type."""
    check_product("lora_add", dtype, arch)
    return table[arch][dtype.itemsize]


def wide_precision(arch: str, dtype: torch.dtype) -> str:
    """How to multiply float32 sums by ``dtype``: three TF32 products on NVIDIA, exact beyond 16-bit dtypes' rounding.

    float32 itself is IEEE everywhere (AMD's matrix units have such a product).
    """
    return "tf32x3" if arch.startswith("sm_") and dtype.itemsize == 2 else "ieee"
