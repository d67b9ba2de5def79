"""Tile sizes of the Triton attention kernels, as data.

Chosen by (architecture, dtype, head_dim), never by the number of tokens, queries or sequences: the tile of
keys fixes the order in which a row is summed, so a size that followed the batch would change bits with it.

``rows``    query rows of a program (queries x the query heads that share a key/value head)
``keys``    keys of a step, anchored at key 0 of the sequence
``warps``, ``stages``   what Triton calls num_warps and num_stages
``slice``   how much of the head dimension a product of scores takes at a time; 0: all of it
"""

from dataclasses import dataclass

import torch

from toolkit.errors import ToolkitError
from toolkit.ops.triton_devices import check_product

MAX_HEAD_DIM, MAX_V_DIM = 576, 512


@dataclass(frozen=True)
class Tile:
    rows: int
    keys: int
    warps: int
    stages: int
    slice: int = 0


@dataclass(frozen=True)
class SinkTile:
    """A program of the sinks' gradient: ``steps`` tiles of ``rows`` x ``heads``."""

    rows: int
    heads: int
    steps: int


SINKS = SinkTile(64, 16, 16)

# architecture -> bytes an element -> ((largest head_dim, tile), ...), smallest head_dim first.
Table = dict[str, dict[int, tuple[tuple[int, Tile], ...]]]

FORWARD: Table = {
    "sm_80": {
        2: (
            (64, Tile(64, 64, 4, 3)),
            (128, Tile(64, 32, 4, 2)),
            (256, Tile(64, 32, 8, 2)),
            (576, Tile(16, 32, 8, 1, 64)),
        ),
        4: (
            (64, Tile(32, 32, 4, 2)),
            (128, Tile(32, 16, 4, 1)),
            (256, Tile(16, 16, 4, 1)),
            (576, Tile(32, 16, 16, 1, 64)),
        ),
    },
    "sm_90": {
        2: (
            (64, Tile(64, 64, 4, 3)),
            (128, Tile(64, 64, 4, 3)),
            (256, Tile(64, 64, 8, 2)),
            (576, Tile(64, 32, 8, 1, 64)),
        ),
        4: (
            (64, Tile(32, 32, 4, 2)),
            (128, Tile(32, 16, 4, 1)),
            (256, Tile(16, 16, 4, 1)),
            (576, Tile(32, 16, 16, 1, 64)),
        ),
    },
    "sm_100": {
        2: (
            (64, Tile(64, 64, 4, 3)),
            (128, Tile(64, 64, 4, 2)),
            (256, Tile(64, 32, 8, 2)),
            (576, Tile(64, 32, 8, 1, 64)),
        ),
        4: (
            (64, Tile(32, 32, 4, 2)),
            (128, Tile(32, 16, 4, 1)),
            (256, Tile(16, 16, 8, 1, 64)),
            (576, Tile(32, 16, 16, 1, 64)),
        ),
    },
    "gfx942": {
        2: (
            (64, Tile(64, 64, 4, 1)),
            (128, Tile(64, 64, 4, 1)),
            (256, Tile(32, 32, 4, 1)),
            (576, Tile(16, 32, 8, 1, 64)),
        ),
        4: (
            (64, Tile(32, 32, 4, 1)),
            (128, Tile(32, 32, 4, 1)),
            (256, Tile(32, 16, 4, 1)),
            (576, Tile(16, 16, 8, 1, 32)),
        ),
    },
    "interpreter": {
        2: ((256, Tile(16, 16, 1, 1)), (576, Tile(16, 16, 1, 1, 64))),
        4: ((256, Tile(16, 16, 1, 1)), (576, Tile(16, 16, 1, 1, 64))),
    },
}

# The kernel that owns rows of queries and gives dq. NVIDIA's matrix units have no IEEE float32 product: a thread
# holds whole rows of both operands, so float32 takes its products in slices of the head, or it would spill.
BACKWARD_QUERIES: Table = {
    "sm_80": {
        2: (
            (64, Tile(32, 64, 4, 2)),
            (128, Tile(32, 64, 8, 1)),
            (256, Tile(16, 32, 4, 1)),
            (576, Tile(16, 32, 8, 1, 64)),
        ),
        4: (
            (64, Tile(16, 16, 4, 1, 32)),
            (128, Tile(16, 16, 8, 1)),
            (256, Tile(16, 16, 8, 1, 64)),
            (576, Tile(16, 16, 16, 1, 32)),
        ),
    },
    "sm_90": {
        2: (
            (64, Tile(64, 64, 4, 2)),
            (128, Tile(64, 64, 8, 1)),
            (256, Tile(32, 32, 4, 1)),
            (576, Tile(64, 32, 8, 1, 64)),
        ),
        4: (
            (64, Tile(16, 16, 4, 1, 32)),
            (128, Tile(16, 16, 8, 1, 64)),
            (256, Tile(32, 16, 8, 1, 64)),
            (576, Tile(16, 16, 16, 1, 32)),
        ),
    },
    "sm_100": {
        2: (
            (64, Tile(64, 64, 4, 2)),
            (128, Tile(64, 64, 8, 1)),
            (256, Tile(64, 32, 8, 1)),
            (576, Tile(64, 32, 8, 1, 64)),
        ),
        4: (
            (64, Tile(16, 16, 4, 1, 32)),
            (128, Tile(16, 16, 8, 1, 64)),
            (256, Tile(32, 16, 8, 1, 64)),
            (576, Tile(16, 16, 16, 1, 32)),
        ),
    },
    "gfx942": {
        2: (
            (64, Tile(32, 32, 4, 1)),
            (128, Tile(32, 32, 4, 1)),
            (256, Tile(16, 16, 4, 1)),
            (576, Tile(16, 32, 8, 1, 64)),
        ),
        4: (
            (64, Tile(16, 16, 4, 1)),
            (128, Tile(16, 16, 4, 1)),
            (256, Tile(16, 16, 4, 1)),
            (576, Tile(16, 16, 8, 1, 32)),
        ),
    },
    "interpreter": {
        2: ((256, Tile(16, 16, 1, 1)), (576, Tile(16, 16, 1, 1, 64))),
        4: ((16, Tile(16, 16, 1, 1)), (256, Tile(16, 16, 1, 1, 16)), (576, Tile(16, 16, 1, 1, 64))),
    },
}

# The kernel that owns rows of keys and gives dk, dv.
BACKWARD_KEYS: Table = {
    "sm_80": {
        2: (
            (64, Tile(32, 64, 4, 2)),
            (128, Tile(32, 64, 8, 1)),
            (256, Tile(16, 32, 8, 1)),
            (576, Tile(16, 32, 8, 1, 64)),
        ),
        4: (
            (64, Tile(16, 16, 4, 1)),
            (128, Tile(16, 16, 8, 1)),
            (256, Tile(16, 16, 8, 1)),
            (576, Tile(16, 8, 8, 1, 32)),
        ),
    },
    "sm_90": {
        2: (
            (64, Tile(32, 64, 4, 2)),
            (128, Tile(32, 64, 8, 1)),
            (256, Tile(32, 32, 8, 1)),
            (576, Tile(16, 32, 8, 1, 64)),
        ),
        4: (
            (64, Tile(16, 16, 4, 1)),
            (128, Tile(16, 16, 8, 1)),
            (256, Tile(16, 16, 8, 1)),
            (576, Tile(16, 8, 8, 1, 32)),
        ),
    },
    "sm_100": {
        2: (
            (64, Tile(64, 64, 4, 1)),
            (128, Tile(32, 64, 8, 1)),
            (256, Tile(32, 32, 8, 1)),
            (576, Tile(16, 32, 8, 1, 64)),
        ),
        4: (
            (64, Tile(16, 16, 4, 1)),
            (128, Tile(16, 8, 8, 1)),
            (256, Tile(16, 16, 8, 1)),
            (576, Tile(16, 8, 8, 1, 32)),
        ),
    },
    "gfx942": BACKWARD_QUERIES["gfx942"],
    "interpreter": FORWARD["interpreter"],
}


def tile(table: Table, arch: str, dtype: torch.dtype, head_dim: int) -> Tile:
    """The tile for an architecture, an element type and the larger of the two head dimensions."""
    check_product("attention", dtype, arch)
    for limit, choice in table[arch][dtype.itemsize]:
        if head_dim <= limit:
            return choice
    raise ToolkitError(f"attention has no Triton tile for head_dim {head_dim}; allowed are up to {MAX_HEAD_DIM}.")
