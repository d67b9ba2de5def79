"""Tiles of the Triton kernels of low-rank adapters, as data: by (architecture, dtype)."""

from toolkit.ops.tiles import GemmTile, TileTable, for_any_size

# A sum along K or N is split into parts of this length, so that few rows keep many programs busy. The parts are added
# in order.
SPLIT = 1024
# The step along a sum whose left side is multiplied by a column scale, in float32.
SCALED_DEPTH = 16
# Rows of an adapter that one program of a weight's gradient sums; its partials are added in order.
SUMMED_ROWS = 512

# Memory for ranks comes in blocks of this many. Every adapter is cut into the same tiles, so that no bit depends on the
# ranks of others.
RANKS = 64


def padded_ranks(ranks: int) -> int:
    """``ranks`` in whole blocks."""
    return max(1, -(-ranks // RANKS)) * RANKS


# [rows, long] x [long, ranks]: columns are ranks, and divide RANKS.
SHRINK = TileTable(
    "lora_add",
    for_any_size(
        {
            "sm_80": {2: GemmTile(64, 64, 64, 4, 3), 4: GemmTile(64, 32, 32, 4, 2)},
            "sm_90": {2: GemmTile(64, 64, 64, 4, 4), 4: GemmTile(64, 32, 32, 4, 2)},
            "sm_100": {2: GemmTile(64, 64, 64, 4, 4), 4: GemmTile(64, 32, 32, 4, 2)},
            "gfx942": {2: GemmTile(64, 64, 64, 4, 2), 4: GemmTile(64, 64, 32, 4, 2)},
            "interpreter": {2: GemmTile(16, 16, 64, 1, 1), 4: GemmTile(16, 16, 64, 1, 1)},
        }
    ),
    unaligned={
        "sm_80": {2: GemmTile(64, 64, 32, 4, 3), 4: GemmTile(32, 32, 32, 4, 2)},
        "sm_90": {2: GemmTile(64, 64, 32, 4, 4), 4: GemmTile(32, 32, 32, 4, 2)},
        "sm_100": {2: GemmTile(64, 64, 32, 4, 4), 4: GemmTile(32, 32, 32, 4, 2)},
        "gfx942": {2: GemmTile(64, 64, 32, 4, 2), 4: GemmTile(32, 32, 32, 4, 2)},
    },
)

# [rows, ranks] x [ranks, columns]: the step is along ranks, and divides the columns of SHRINK.
EXPAND = TileTable(
    "lora_add",
    for_any_size(
        {
            "sm_80": {2: GemmTile(64, 128, 16, 8, 1), 4: GemmTile(64, 64, 16, 8, 1)},
            "sm_90": {2: GemmTile(64, 128, 32, 8, 1), 4: GemmTile(64, 64, 16, 8, 1)},
            "sm_100": {2: GemmTile(64, 128, 32, 8, 1), 4: GemmTile(64, 64, 16, 8, 1)},
            "gfx942": {2: GemmTile(64, 128, 32, 4, 1), 4: GemmTile(64, 64, 16, 4, 1)},
            "interpreter": {2: GemmTile(16, 32, 16, 1, 1), 4: GemmTile(16, 32, 16, 1, 1)},
        }
    ),
    unaligned={
        "sm_80": {2: GemmTile(64, 64, 16, 8, 1)},
        "sm_90": {2: GemmTile(64, 64, 32, 8, 1)},
        "sm_100": {2: GemmTile(64, 64, 16, 8, 1)},
        "gfx942": {2: GemmTile(64, 64, 32, 4, 1)},
    },
)

# As EXPAND, with rows of the gradient and of the base beside the product.
SCALE = TileTable(
    "lora_add",
    for_any_size(
        {
            "sm_80": {2: GemmTile(64, 64, 16, 8, 1), 4: GemmTile(32, 64, 16, 8, 1)},
            "sm_90": {2: GemmTile(64, 64, 16, 8, 1), 4: GemmTile(32, 64, 16, 8, 1)},
            "sm_100": {2: GemmTile(64, 64, 16, 8, 1), 4: GemmTile(32, 64, 16, 8, 1)},
            "gfx942": {2: GemmTile(64, 64, 16, 8, 1), 4: GemmTile(32, 64, 16, 8, 1)},
            "interpreter": {2: GemmTile(16, 32, 16, 1, 1), 4: GemmTile(16, 32, 16, 1, 1)},
        }
    ),
)

# [ranks, rows] x [rows, columns]: rows of the tile are ranks and divide RANKS, the step is along rows of the batch.
OUTER = TileTable(
    "lora_add",
    for_any_size(
        {
            "sm_80": {2: GemmTile(64, 64, 32, 4, 2), 4: GemmTile(32, 64, 16, 4, 2)},
            "sm_90": {2: GemmTile(64, 64, 32, 4, 2), 4: GemmTile(32, 64, 16, 4, 2)},
            "sm_100": {2: GemmTile(64, 64, 32, 4, 2), 4: GemmTile(32, 64, 16, 4, 2)},
            "gfx942": {2: GemmTile(64, 64, 32, 4, 2), 4: GemmTile(32, 64, 16, 4, 2)},
            "interpreter": {2: GemmTile(16, 32, 16, 1, 1), 4: GemmTile(16, 32, 16, 1, 1)},
        }
    ),
)
