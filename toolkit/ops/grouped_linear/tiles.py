"""Tiles of the Triton grouped products, as data: by (architecture, element type, N, K), never by rows.

``rows`` x ``columns``  outputs of a program at a time (entries of a weight's gradient)
``depth``    the step along K (along an expert's rows)
``warps``, ``stages``   what Triton calls num_warps and num_stages
``group``    row tiles that are worked on together, column by column, so that their weights stay in L2
"""

from dataclasses import dataclass

import torch

from toolkit.ops.linear.tiles import ALIGNED_DEPTH
from toolkit.ops.triton_devices import check_product


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8


Table = dict[str, dict[int, Tile]]

# [rows of one expert, K] x [K, columns]. Of a gated product the columns are half gate, half up. The rows are those of
# a plan's tile by default: a taller tile takes several programs, a lower one leaves rows of its program empty.
PRODUCT: Table = {
    "sm_80": {2: Tile(64, 128, 32, 4, 4), 4: Tile(64, 64, 16, 8, 3)},
    "sm_90": {2: Tile(64, 256, 64, 8, 4), 4: Tile(64, 64, 32, 8, 2)},
    "sm_100": {2: Tile(64, 256, 64, 8, 4), 4: Tile(64, 64, 16, 8, 3)},
    "gfx942": {2: Tile(64, 128, 64, 4, 2), 4: Tile(64, 64, 16, 4, 2)},
    "interpreter": {2: Tile(16, 32, 32, 1, 1, 2), 4: Tile(16, 32, 32, 1, 1, 2)},
}
# The product of the backward between the two weights, whose epilogue holds activations, slopes and scores as well.
INNER: Table = {
    "sm_80": {2: Tile(64, 64, 32, 8, 4), 4: Tile(64, 64, 16, 8, 3)},
    "sm_90": {2: Tile(64, 64, 64, 8, 4), 4: Tile(64, 64, 16, 8, 3)},
    "sm_100": {2: Tile(64, 128, 64, 8, 4), 4: Tile(64, 64, 16, 8, 3)},
    "gfx942": {2: Tile(64, 64, 64, 4, 2), 4: Tile(64, 64, 16, 4, 2)},
    "interpreter": {2: Tile(16, 16, 32, 1, 1, 2), 4: Tile(16, 16, 32, 1, 1, 2)},
}
# A weight's gradient: [rows, an expert's rows] x [an expert's rows, columns].
OUTER: Table = {
    "sm_80": {2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 64, 16, 8, 3)},
    "sm_90": {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 64, 16, 8, 3)},
    "sm_100": {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 64, 16, 8, 3)},
    "gfx942": {2: Tile(128, 128, 32, 8, 2), 4: Tile(64, 64, 16, 4, 2)},
    "interpreter": {2: Tile(16, 32, 16, 1, 1), 4: Tile(16, 32, 16, 1, 1)},
}
# Where a matrix has rows that are not aligned: loads go element by element, and a large tile would spill.
UNALIGNED = Tile(64, 64, 32, 8, 1)
UNALIGNED_OUTER = Tile(64, 64, 64, 8, 1)
UNALIGNED_FLOAT = Tile(64, 32, 16, 8, 2)


def tile(table: Table, arch: str, dtype: torch.dtype, *widths: int) -> Tile:
    """The tile for an architecture, an element type and the widths of the matrices that are read (N and K)."""
    check_product("grouped_linear", dtype, arch)
    if arch != "interpreter" and any(width % ALIGNED_DEPTH for width in widths):
        if dtype.itemsize == 2:
            return UNALIGNED_OUTER if table is OUTER else UNALIGNED
        if table is not OUTER:
            return UNALIGNED_FLOAT
    return table[arch][dtype.itemsize]
