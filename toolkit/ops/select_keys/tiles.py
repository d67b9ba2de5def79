"""Tile sizes of the Triton kernels that score and select keys, as data."""

from dataclasses import dataclass

from toolkit.ops.tiles import Choices, GemmTile, TileTable

Entries = dict[str, dict[int, Choices[GemmTile]]]

# ``rows`` heads of the indexer x ``columns`` keys, in steps of ``depth`` along the head.
_HALF: Choices[GemmTile] = ((256, GemmTile(64, 64, 64, 4, 2)),)
_FLOAT: Choices[GemmTile] = ((256, GemmTile(16, 32, 32, 4, 1)),)
_SCORES: Entries = {arch: {2: _HALF, 4: _FLOAT} for arch in ("sm_80", "sm_90", "sm_100", "gfx942")} | {
    "interpreter": {size: ((256, GemmTile(16, 32, 64, 1, 1)),) for size in (2, 4)}
}
SCORES = TileTable("select_keys", _SCORES, size_name="head_dim")


@dataclass(frozen=True)
class SelectTile:
    """One program of the selection of a row: ``columns`` ranks at a time."""

    columns: int
    warps: int

    def keys(self, arch: str) -> int:
        """Ranks at a time; the interpreter takes few, so that tests pass over several tiles."""
        return 32 if arch == "interpreter" else self.columns


SELECT = SelectTile(2048, 8)
# (row, key) pairs whose ranks are held at a time.
WORKSPACE = 1 << 26
