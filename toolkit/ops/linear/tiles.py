"""Tiles of the Triton ``linear``, as data: chosen by (architecture, element type, N, K), never by rows.

``rows`` x ``columns``  outputs of a program
``depth``    the step along K
``warps``, ``stages``   what Triton calls num_warps and num_stages
``group``    row tiles that are worked on together, column by column, so that their weights stay in L2
"""

from dataclasses import dataclass

import torch

from toolkit.ops.triton_devices import check_product

DECODE_ROWS = 64


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8


@dataclass(frozen=True)
class Choice:
    """The tile for weights of at most ``outputs`` rows (None: any).

    decode: a tile for at most DECODE_ROWS rows of x. It may be set only where it was shown to give the same bits
    as ``tile``: benchmarks/gpu/tile_invariance.py and tests/gpu measure that, and until they did, every entry is None.
    """

    outputs: int | None
    tile: Tile
    decode: Tile | None = None


# architecture -> bytes an element -> choices, smallest `outputs` first.
TABLE: dict[str, dict[int, tuple[Choice, ...]]] = {
    "sm_80": {
        2: (Choice(4096, Tile(128, 128, 32, 4, 4)), Choice(None, Tile(128, 256, 32, 8, 3))),
        4: (Choice(None, Tile(128, 64, 16, 8, 3)),),
    },
    "sm_90": {
        2: (Choice(4096, Tile(128, 128, 64, 4, 3)), Choice(None, Tile(128, 256, 64, 8, 4))),
        4: (Choice(None, Tile(128, 64, 16, 8, 3)),),
    },
    "sm_100": {
        2: (Choice(4096, Tile(128, 128, 64, 4, 3)), Choice(None, Tile(128, 256, 64, 8, 4))),
        4: (Choice(None, Tile(128, 64, 16, 8, 3)),),
    },
    "gfx942": {
        2: (Choice(4096, Tile(128, 128, 64, 4, 2)), Choice(None, Tile(256, 256, 64, 8, 2))),
        4: (Choice(None, Tile(128, 128, 16, 8, 2)),),
    },
    "interpreter": {
        2: (Choice(24, Tile(16, 16, 16, 1, 1, 2)), Choice(None, Tile(32, 16, 32, 1, 1, 2))),
        4: (Choice(24, Tile(16, 16, 16, 1, 1, 2)), Choice(None, Tile(32, 16, 32, 1, 1, 2))),
    },
}

# K that is no multiple of this leaves rows unaligned: loads go element by element, and a large tile would spill.
ALIGNED_DEPTH = 16
UNALIGNED: dict[str, Tile] = {
    "sm_80": Tile(64, 64, 32, 4, 2),
    "sm_90": Tile(64, 64, 32, 4, 2),
    "sm_100": Tile(64, 64, 32, 4, 2),
    "gfx942": Tile(64, 64, 32, 4, 1),
}


def tile(arch: str, dtype: torch.dtype, outputs: int, depth: int, rows: int) -> Tile:
    """The tile for an architecture, an element type, N and K; ``rows`` counts only where a decode tile is set."""
    check_product("linear", dtype, arch)
    if dtype.itemsize == 2 and depth % ALIGNED_DEPTH and arch in UNALIGNED:
        return UNALIGNED[arch]
    choice = next(c for c in TABLE[arch][dtype.itemsize] if c.outputs is None or outputs <= c.outputs)
    return choice.decode if choice.decode is not None and rows <= DECODE_ROWS else choice.tile
