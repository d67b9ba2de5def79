"""Tiles of the Triton ``linear_logprob``, as data: by (architecture, dtype)."""

from toolkit.ops.tiles import GemmTile, TileTable, for_any_size

# Vocabulary columns per program of the forward; the statistics of the splits are joined in order.
SPLIT = 1024
# Vocabulary columns whose logit gradients the backward holds at a time.
CHUNK = 8192
# Rows whose logits linear_cross_entropy holds at a time: 622 MB in 16 bits at V = 151,936.
PART = 2048

_UNALIGNED = {arch: {2: GemmTile(64, 64, 32, 8, 1)} for arch in ("sm_80", "sm_90", "sm_100", "gfx942")}

# Rows x vocabulary columns in steps along K. Forward and backward share one table, so that their logits are bitwise
# identical.
_LOGITS = {
    "sm_80": {2: GemmTile(64, 64, 64, 4, 3), 4: GemmTile(64, 64, 16, 8, 3)},
    "sm_90": {2: GemmTile(128, 128, 32, 8, 5), 4: GemmTile(64, 64, 16, 8, 3)},
    "sm_100": {2: GemmTile(128, 128, 32, 8, 5), 4: GemmTile(64, 64, 16, 8, 3)},
    "gfx942": {2: GemmTile(128, 128, 32, 8, 2), 4: GemmTile(64, 64, 16, 4, 2)},
    "interpreter": {2: GemmTile(16, 16, 32, 1, 1), 4: GemmTile(16, 16, 32, 1, 1)},
}
LOGITS = TileTable("linear_logprob", for_any_size(_LOGITS), _UNALIGNED)

# Logits with a soft-cap or a temperature, which take more registers.
_SHAPED = _LOGITS | {arch: _LOGITS[arch] | {2: GemmTile(128, 64, 64, 8, 4)} for arch in ("sm_90", "sm_100")}
SHAPED_LOGITS = TileTable("linear_logprob", for_any_size(_SHAPED), _UNALIGNED)

# The gradient of the hidden states, in steps along the vocabulary.
_GRADIENT = {
    "sm_80": {2: GemmTile(128, 128, 32, 8, 3), 4: GemmTile(64, 64, 16, 8, 3)},
    "sm_90": {2: GemmTile(128, 128, 64, 8, 4), 4: GemmTile(64, 64, 16, 8, 3)},
    "sm_100": {2: GemmTile(128, 128, 64, 8, 4), 4: GemmTile(64, 64, 16, 8, 3)},
    "gfx942": {2: GemmTile(128, 128, 32, 8, 2), 4: GemmTile(64, 64, 16, 4, 2)},
    "interpreter": {2: GemmTile(16, 16, 16, 1, 1), 4: GemmTile(16, 16, 16, 1, 1)},
}
HIDDEN = TileTable("linear_logprob_backward", for_any_size(_GRADIENT), _UNALIGNED)
