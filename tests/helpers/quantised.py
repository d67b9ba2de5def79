"""Quantised weights for tests: every format, and every variant of its scales."""

import torch
from torch import Tensor

from tests.helpers.rowwise import integers, seeded
from toolkit.ops.quantised_linear import find
from toolkit.ops.quantised_linear.packing import pack_codes, pack_groups

# name: format, options of its quantiser
VARIANTS: dict[str, tuple[str, dict]] = {
    "int8": ("int8", {}),
    "q8_0": ("q8_0", {}),
    "int4": ("int4", {"group": 32}),
    "int4 float32 scales": ("int4", {"group": 64, "scale_dtype": torch.float32}),
    "int4 bfloat16 scales": ("int4", {"scale_dtype": torch.bfloat16, "symmetric": True}),
    "nf4": ("nf4", {}),
    "nf4 single": ("nf4", {"double": False}),
    "fp8": ("fp8", {}),
    "q4_k": ("q4_k", {}),
}


def packed(variant: str, outputs: int, inputs: int, seed: int = 0) -> tuple[str, Tensor, list[Tensor]]:
    """Format, packed codes and scales of a weight [outputs, inputs] of normal numbers; of q4_k of random parts."""
    name, options = VARIANTS[variant]
    if name != "q4_k":
        return name, *find(name).quantise(seeded(outputs, inputs, dtype=torch.float32, seed=seed) / 8, **options)
    groups = -(-inputs // 32)
    codes = integers(0, 16, outputs, inputs, seed=seed)
    shared = seeded(2, outputs, -(-groups // 8), dtype=torch.float16, scale=0.01, seed=seed)
    single = integers(0, 64, 2, outputs, groups, seed=seed + 1).to(torch.uint8)
    return name, pack_codes(codes, 4), [pack_groups(part) for part in (*shared, *single)]
