"""Tiles of the Triton ``linear``, as data: by (architecture, dtype, N).

``decode`` of a tile may be set only where it was shown to be bitwise identical to that tile.
benchmarks/gpu/tile_invariance.py and tests/ops/test_bounds_gemm.py measure that; until they did, every entry is None.
"""

from toolkit.ops.tiles import Choices, GemmTile, TileTable

_ENTRIES: dict[str, dict[int, Choices[GemmTile]]] = {
    "sm_80": {
        2: ((4096, GemmTile(128, 128, 32, 4, 4)), (None, GemmTile(128, 256, 32, 8, 3))),
        4: ((None, GemmTile(128, 64, 16, 8, 3)),),
    },
    "sm_90": {
        2: ((4096, GemmTile(128, 128, 64, 4, 3)), (None, GemmTile(128, 256, 64, 8, 4))),
        4: ((None, GemmTile(128, 64, 16, 8, 3)),),
    },
    "sm_100": {
        2: ((4096, GemmTile(128, 128, 64, 4, 3)), (None, GemmTile(128, 256, 64, 8, 4))),
        4: ((None, GemmTile(128, 64, 16, 8, 3)),),
    },
    "gfx942": {
        2: ((4096, GemmTile(128, 128, 64, 4, 2)), (None, GemmTile(256, 256, 64, 8, 2))),
        4: ((None, GemmTile(128, 128, 16, 8, 2)),),
    },
    "interpreter": {
        2: ((24, GemmTile(16, 16, 16, 1, 1, 2)), (None, GemmTile(32, 16, 32, 1, 1, 2))),
        4: ((24, GemmTile(16, 16, 16, 1, 1, 2)), (None, GemmTile(32, 16, 32, 1, 1, 2))),
    },
}

_UNALIGNED = {
    "sm_80": {2: GemmTile(64, 64, 32, 4, 2)},
    "sm_90": {2: GemmTile(64, 64, 32, 4, 2)},
    "sm_100": {2: GemmTile(64, 64, 32, 4, 2)},
    "gfx942": {2: GemmTile(64, 64, 32, 4, 1)},
}

TABLE = TileTable("linear", _ENTRIES, _UNALIGNED)
