"""Tiles of the Triton ``linear_logprob``, as data: by (architecture, element type), never by rows.

``rows`` x ``columns``  logits of a program at a time (or entries of a gradient)
``depth``    the step along K (or along the vocabulary, or along rows)
``warps``, ``stages``   what Triton calls num_warps and num_stages
"""

from dataclasses import dataclass

import torch

from toolkit.ops.linear.tiles import ALIGNED_DEPTH
from toolkit.ops.triton_devices import check_product

# Columns of the vocabulary that one program of the forward walks; its statistics are joined in order.
SPLIT = 1024
# Columns whose gradients to the logits are held at a time in the backward.
CHUNK = 4096


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


Table = dict[str, dict[int, Tile]]

# Logits, forward and backward: one table, so that both get the same bits.
LOGITS: Table = {
    "sm_80": {2: Tile(64, 64, 64, 4, 3), 4: Tile(64, 64, 16, 8, 3)},
    "sm_90": {2: Tile(128, 128, 32, 8, 5), 4: Tile(64, 64, 16, 8, 3)},
    "sm_100": {2: Tile(128, 128, 32, 8, 5), 4: Tile(64, 64, 16, 8, 3)},
    "gfx942": {2: Tile(128, 128, 32, 8, 2), 4: Tile(64, 64, 16, 4, 2)},
    "interpreter": {2: Tile(16, 16, 32, 1, 1), 4: Tile(16, 16, 32, 1, 1)},
}
# Logits with a cap or a temperature, which take more registers.
SHAPED: dict[str, Tile] = {"sm_90": Tile(128, 64, 64, 8, 4), "sm_100": Tile(128, 64, 64, 8, 4)}
# Where K leaves rows unaligned, and loads go element by element.
UNALIGNED = Tile(64, 64, 32, 8, 1)

# The gradients to hidden states and weights: [rows, depth] x [depth, columns].
HIDDEN: Table = {
    "sm_80": {2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 64, 16, 8, 3)},
    "sm_90": {2: Tile(128, 128, 64, 8, 4), 4: Tile(64, 64, 16, 8, 3)},
    "sm_100": {2: Tile(128, 128, 64, 8, 4), 4: Tile(64, 64, 16, 8, 3)},
    "gfx942": {2: Tile(128, 128, 32, 8, 2), 4: Tile(64, 64, 16, 4, 2)},
    "interpreter": {2: Tile(16, 16, 16, 1, 1), 4: Tile(16, 16, 16, 1, 1)},
}
WEIGHT: Table = HIDDEN


def tile(table: Table, arch: str, dtype: torch.dtype, inner: int, shaped: bool = False) -> Tile:
    """The tile for an architecture, an element type and the width K of the hidden states.

    shaped: for logits with a cap or a temperature.
    """
    check_product("linear_logprob", dtype, arch)
    if inner % ALIGNED_DEPTH and dtype.itemsize == 2 and arch != "interpreter":
        return UNALIGNED
    if shaped and dtype.itemsize == 2 and arch in SHAPED:
        return SHAPED[arch]
    return table[arch][dtype.itemsize]
