"""Tiles of the Triton grouped GEMMs, as data: by (architecture, dtype, alignment of N and K)."""

from toolkit.ops.tiles import GemmTile, TileTable, for_any_size

_ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
_UNALIGNED = {arch: {2: GemmTile(64, 64, 32, 8, 1), 4: GemmTile(64, 32, 16, 8, 2)} for arch in _ARCHITECTURES}

# [rows of one expert, K] x [K, columns]. With a gate, half of the columns are gate, half up. The rows are those of
# a plan's tile by default: a taller tile takes several programs, a lower one leaves rows of its program empty.
_PRODUCT = {
    "sm_80": {2: GemmTile(64, 128, 32, 4, 4), 4: GemmTile(64, 64, 16, 8, 3)},
    "sm_90": {2: GemmTile(64, 256, 64, 8, 4), 4: GemmTile(64, 64, 32, 8, 2)},
    "sm_100": {2: GemmTile(64, 256, 64, 8, 4), 4: GemmTile(64, 64, 16, 8, 3)},
    "gfx942": {2: GemmTile(64, 128, 64, 4, 2), 4: GemmTile(64, 64, 16, 4, 2)},
    "interpreter": {2: GemmTile(16, 32, 32, 1, 1, 2), 4: GemmTile(16, 32, 32, 1, 1, 2)},
}
PRODUCT = TileTable("grouped_linear", for_any_size(_PRODUCT), _UNALIGNED)

# The backward's GEMM between the two weights, whose epilogue also holds activations, derivatives and routing weights.
_INNER = {
    "sm_80": {2: GemmTile(64, 64, 32, 8, 4), 4: GemmTile(64, 64, 16, 8, 3)},
    "sm_90": {2: GemmTile(64, 64, 64, 8, 4), 4: GemmTile(64, 64, 16, 8, 3)},
    "sm_100": {2: GemmTile(64, 128, 64, 8, 4), 4: GemmTile(64, 64, 16, 8, 3)},
    "gfx942": {2: GemmTile(64, 64, 64, 4, 2), 4: GemmTile(64, 64, 16, 4, 2)},
    "interpreter": {2: GemmTile(16, 16, 32, 1, 1, 2), 4: GemmTile(16, 16, 32, 1, 1, 2)},
}
INNER = TileTable("grouped_linear", for_any_size(_INNER), _UNALIGNED)

# A weight's gradient: [rows, an expert's rows] x [an expert's rows, columns], in steps along an expert's rows.
_OUTER = {
    "sm_80": {2: GemmTile(128, 128, 32, 8, 3), 4: GemmTile(64, 64, 16, 8, 3)},
    "sm_90": {2: GemmTile(128, 128, 64, 8, 3), 4: GemmTile(64, 64, 16, 8, 3)},
    "sm_100": {2: GemmTile(128, 128, 64, 8, 3), 4: GemmTile(64, 64, 16, 8, 3)},
    "gfx942": {2: GemmTile(128, 128, 32, 8, 2), 4: GemmTile(64, 64, 16, 4, 2)},
    "interpreter": {2: GemmTile(16, 32, 16, 1, 1), 4: GemmTile(16, 32, 16, 1, 1)},
}
_UNALIGNED_OUTER = {arch: {2: GemmTile(64, 64, 64, 8, 1)} for arch in _ARCHITECTURES}
OUTER = TileTable("grouped_linear", for_any_size(_OUTER), _UNALIGNED_OUTER)
