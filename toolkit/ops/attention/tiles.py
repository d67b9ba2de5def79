"""Tile sizes of the Triton attention kernels, as data: by (architecture, dtype, head dimension).

Both GEMMs of a step have one tile: ``rows`` query rows (queries x the query heads that share a key/value head) x
``columns`` keys, counted from key 0 of the sequence. ``depth`` is the slice of the head dimension that the scores take
per step; 0: the whole head.
"""

from dataclasses import dataclass

from toolkit.ops.tiles import Choices, GemmTile, TileTable

MAX_V_DIM = 512


@dataclass(frozen=True)
class SinkTile:
    """One program of the sinks' gradient: ``steps`` tiles of ``rows`` x ``heads``."""

    rows: int
    heads: int
    steps: int


SINKS = SinkTile(64, 16, 16)

Entries = dict[str, dict[int, Choices[GemmTile]]]

_FORWARD: Entries = {
    "sm_80": {
        2: (
            (64, GemmTile(64, 64, 0, 4, 3)),
            (128, GemmTile(64, 32, 0, 4, 2)),
            (256, GemmTile(64, 32, 0, 8, 2)),
            (576, GemmTile(16, 32, 64, 8, 1)),
        ),
        4: (
            (64, GemmTile(32, 32, 32, 4, 2)),
            (128, GemmTile(32, 16, 0, 4, 1)),
            (256, GemmTile(16, 16, 0, 4, 1)),
            (576, GemmTile(32, 16, 64, 16, 1)),
        ),
    },
    "sm_90": {
        2: (
            (64, GemmTile(64, 64, 0, 4, 3)),
            (128, GemmTile(64, 64, 0, 4, 3)),
            (256, GemmTile(64, 64, 0, 8, 2)),
            (576, GemmTile(64, 32, 64, 8, 1)),
        ),
        4: (
            (64, GemmTile(32, 32, 0, 4, 1)),
            (128, GemmTile(32, 16, 0, 4, 1)),
            (256, GemmTile(16, 16, 0, 4, 1)),
            (576, GemmTile(32, 16, 64, 16, 1)),
        ),
    },
    "sm_100": {
        2: (
            (64, GemmTile(64, 64, 0, 4, 3)),
            (128, GemmTile(64, 64, 0, 4, 2)),
            (256, GemmTile(64, 32, 0, 8, 1)),
            (576, GemmTile(64, 32, 64, 8, 1)),
        ),
        4: (
            (64, GemmTile(32, 32, 0, 4, 1)),
            (128, GemmTile(32, 16, 0, 8, 1)),
            (256, GemmTile(16, 16, 64, 8, 1)),
            (576, GemmTile(32, 16, 64, 16, 1)),
        ),
    },
    "gfx942": {
        2: (
            (64, GemmTile(64, 64, 0, 4, 1)),
            (128, GemmTile(64, 64, 0, 4, 1)),
            (256, GemmTile(32, 32, 0, 4, 1)),
            (576, GemmTile(16, 32, 64, 8, 1)),
        ),
        4: (
            (64, GemmTile(32, 32, 0, 4, 1)),
            (128, GemmTile(32, 32, 0, 4, 1)),
            (256, GemmTile(32, 16, 0, 4, 1)),
            (576, GemmTile(16, 16, 32, 8, 1)),
        ),
    },
    "interpreter": {
        2: ((256, GemmTile(16, 16, 0, 1, 1)), (576, GemmTile(16, 16, 64, 1, 1))),
        4: ((256, GemmTile(16, 16, 0, 1, 1)), (576, GemmTile(16, 16, 64, 1, 1))),
    },
}

# The kernel that owns rows of queries and gives dq. NVIDIA's matrix units have no IEEE float32 product: a thread
# holds whole rows of both operands, so float32 takes its products in slices of the head, or it would spill.
_BACKWARD_QUERIES: Entries = {
    "sm_80": {
        2: (
            (64, GemmTile(32, 64, 0, 4, 2)),
            (128, GemmTile(32, 64, 0, 8, 1)),
            (256, GemmTile(16, 32, 0, 4, 1)),
            (576, GemmTile(16, 32, 64, 8, 1)),
        ),
        4: (
            (64, GemmTile(16, 16, 32, 4, 1)),
            (128, GemmTile(16, 16, 0, 8, 1)),
            (256, GemmTile(16, 16, 64, 8, 1)),
            (576, GemmTile(16, 16, 32, 16, 1)),
        ),
    },
    "sm_90": {
        2: (
            (64, GemmTile(64, 64, 0, 4, 2)),
            (128, GemmTile(64, 64, 0, 8, 1)),
            (256, GemmTile(32, 32, 0, 4, 1)),
            (576, GemmTile(64, 32, 64, 8, 1)),
        ),
        4: (
            (64, GemmTile(16, 16, 32, 4, 1)),
            (128, GemmTile(16, 16, 32, 8, 1)),
            (256, GemmTile(32, 32, 64, 8, 1)),
            (576, GemmTile(16, 16, 32, 16, 1)),
        ),
    },
    "sm_100": {
        2: (
            (64, GemmTile(32, 64, 0, 4, 2)),
            (128, GemmTile(64, 64, 0, 8, 1)),
            (256, GemmTile(64, 32, 0, 8, 1)),
            (576, GemmTile(64, 32, 64, 8, 1)),
        ),
        4: (
            (64, GemmTile(16, 16, 32, 4, 1)),
            (128, GemmTile(16, 16, 32, 8, 1)),
            (256, GemmTile(32, 16, 64, 8, 1)),
            (576, GemmTile(16, 16, 32, 16, 1)),
        ),
    },
    "gfx942": {
        2: (
            (64, GemmTile(32, 32, 0, 4, 1)),
            (128, GemmTile(32, 32, 0, 4, 1)),
            (256, GemmTile(16, 16, 0, 4, 1)),
            (576, GemmTile(16, 32, 64, 8, 1)),
        ),
        4: (
            (64, GemmTile(16, 16, 0, 4, 1)),
            (128, GemmTile(16, 16, 0, 4, 1)),
            (256, GemmTile(16, 16, 0, 4, 1)),
            (576, GemmTile(16, 16, 32, 8, 1)),
        ),
    },
    "interpreter": {
        2: ((256, GemmTile(16, 16, 0, 1, 1)), (576, GemmTile(16, 16, 64, 1, 1))),
        4: ((16, GemmTile(16, 16, 0, 1, 1)), (256, GemmTile(16, 16, 16, 1, 1)), (576, GemmTile(16, 16, 64, 1, 1))),
    },
}

# The kernel that owns rows of keys and gives dk, dv.
_BACKWARD_KEYS: Entries = {
    "sm_80": {
        2: (
            (64, GemmTile(32, 64, 0, 4, 2)),
            (128, GemmTile(32, 64, 0, 8, 1)),
            (256, GemmTile(16, 32, 0, 8, 1)),
            (576, GemmTile(16, 32, 64, 8, 1)),
        ),
        4: (
            (64, GemmTile(16, 16, 0, 4, 1)),
            (128, GemmTile(16, 16, 0, 8, 1)),
            (256, GemmTile(8, 16, 0, 8, 1)),
            (576, GemmTile(16, 8, 32, 8, 1)),
        ),
    },
    "sm_90": {
        2: (
            (64, GemmTile(32, 64, 0, 4, 2)),
            (128, GemmTile(32, 64, 0, 8, 1)),
            (256, GemmTile(32, 32, 0, 8, 1)),
            (576, GemmTile(16, 32, 64, 8, 1)),
        ),
        4: (
            (64, GemmTile(16, 16, 0, 4, 1)),
            (128, GemmTile(16, 16, 0, 8, 1)),
            (256, GemmTile(16, 16, 0, 8, 1)),
            (576, GemmTile(16, 8, 32, 8, 1)),
        ),
    },
    "sm_100": {
        2: (
            (64, GemmTile(64, 64, 0, 8, 1)),
            (128, GemmTile(32, 64, 0, 8, 1)),
            (256, GemmTile(32, 32, 0, 8, 1)),
            (576, GemmTile(16, 32, 64, 8, 1)),
        ),
        4: (
            (64, GemmTile(16, 16, 0, 4, 1)),
            (128, GemmTile(16, 16, 0, 8, 1)),
            (256, GemmTile(16, 16, 0, 8, 1)),
            (576, GemmTile(16, 8, 32, 8, 1)),
        ),
    },
    "gfx942": _BACKWARD_QUERIES["gfx942"],
    "interpreter": _FORWARD["interpreter"],
}

FORWARD = TileTable("attention", _FORWARD, size_name="head_dim")
BACKWARD_QUERIES = TileTable("attention_backward", _BACKWARD_QUERIES, size_name="head_dim")
BACKWARD_KEYS = TileTable("attention_backward", _BACKWARD_KEYS, size_name="head_dim")

# Keys per split of the forward, counted from key 0 of the sequence: a multiple of every tile's keys. Short enough that
# one long context fills a device while it decodes; long enough that joining splits costs a few percent of the whole.
_SPLITS: dict[int, Choices[int]] = {
    2: ((256, 2048), (576, 1024)),
    4: ((256, 2048), (576, 1024)),
}
SPLITS: TileTable[int] = TileTable(
    "attention",
    {
        **dict.fromkeys(("sm_80", "sm_90", "sm_100", "gfx942"), _SPLITS),
        "interpreter": {2: ((576, 32),), 4: ((576, 32),)},
    },
)
# These only decide which program computes what. With at most APART_ROWS rows of queries every split has its own
# program, as long as their sums take at most WORKSPACE float32 numbers. One program joins JOINED_COLUMNS columns of v.
APART_ROWS, WORKSPACE, JOINED_COLUMNS = 512, 1 << 26, 32
