"""Tile sizes of the Triton attention kernels, as data.

Chosen by (architecture, dtype, head_dim), never by the number of tokens, queries or sequences: the tile and the split
of keys fix the order in which a row is summed, so a size that followed the batch would change bits with it.

``rows``    query rows of a program (queries x the query heads that share a key/value head)
``keys``    keys of a step, anchored at key 0 of the sequence
``warps``, ``stages``   what Triton calls num_warps and num_stages
``slice``   how much of the head dimension a product of scores takes at a time; 0: all of it
"""

from dataclasses import dataclass
from typing import TypeVar

import torch

from toolkit.errors import ToolkitError
from toolkit.ops.triton_devices import check_product

MAX_HEAD_DIM, MAX_V_DIM = 576, 512
T = TypeVar("T")


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
            (64, Tile(32, 32, 4, 2, 32)),
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
            (64, Tile(32, 32, 4, 1)),
            (128, Tile(32, 16, 4, 1)),
            (256, Tile(16, 16, 4, 1)),
            (576, Tile(32, 16, 16, 1, 64)),
        ),
    },
    "sm_100": {
        2: (
            (64, Tile(64, 64, 4, 3)),
            (128, Tile(64, 64, 4, 2)),
            (256, Tile(64, 32, 8, 1)),
            (576, Tile(64, 32, 8, 1, 64)),
        ),
        4: (
            (64, Tile(32, 32, 4, 1)),
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
            (64, Tile(32, 64, 4, 2)),
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


# Keys of a split of the forward, counted from key 0 of the sequence: a multiple of every tile's keys. Short enough that
# one long context fills a device while it decodes; long enough that joining splits costs a few percent of walking them.
_SPLITS: dict[int, tuple[tuple[int, int], ...]] = {
    2: ((256, 2048), (576, 1024)),
    4: ((256, 2048), (576, 1024)),
}
SPLITS: dict[str, dict[int, tuple[tuple[int, int], ...]]] = {
    **dict.fromkeys(("sm_80", "sm_90", "sm_100", "gfx942"), _SPLITS),
    "interpreter": {2: ((576, 32),), 4: ((576, 32),)},
}
# What only says who computes what: with at most APART_ROWS rows of queries every split has a program of its own, as
# long as their sums take at most WORKSPACE float32 numbers. A program joins JOINED_COLUMNS of the values.
APART_ROWS, WORKSPACE, JOINED_COLUMNS = 512, 1 << 26, 32


def tile(table: Table, arch: str, dtype: torch.dtype, head_dim: int) -> Tile:
    """The tile for an architecture, an element type and the larger of the two head dimensions."""
    check_product("attention", dtype, arch)
    return _fitting(table[arch][dtype.itemsize], head_dim)


def split(arch: str, dtype: torch.dtype, head_dim: int) -> int:
    """The keys of a split, of the same arguments."""
    return _fitting(SPLITS[arch][dtype.itemsize], head_dim)


def _fitting(choices: tuple[tuple[int, T], ...], head_dim: int) -> T:
    for limit, choice in choices:
        if head_dim <= limit:
            return choice
    raise ToolkitError(f"attention has no Triton tile for head_dim {head_dim}; allowed are up to {MAX_HEAD_DIM}.")
