"""q4_k: unsigned 4-bit codes in groups of 32; eight groups share a float16 scale and minimum: GGUF's Q4_K, repacked.

``code * (d * sc) - dmin * m`` with 6-bit integers sc and m per group. Both products are exact in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.ops.quantised_linear.packing import panels, spread, unpack_groups

BITS = 4
CODES = torch.int32
GROUPS = (32,)
SCALES = (("d", "dmin", "sc", "m"),)
SHARED = 8  # groups that share d and dmin


def scale_shapes(
    names: Sequence[str], outputs: int, groups: int
) -> dict[str, tuple[list[int], tuple[torch.dtype, ...]]]:
    shared = ([panels(outputs), -(-groups // SHARED), 16], (torch.float16,))
    single = ([panels(outputs), groups, 16], (torch.uint8,))
    return {"d": shared, "dmin": shared, "sc": single, "m": single}


def values(codes: Tensor, scales: Sequence[Tensor], outputs: int, group: int) -> Tensor:
    d, dmin, sc, m = (unpack_groups(part, outputs).to(torch.float32) for part in scales)
    groups, inputs = sc.shape[1], codes.shape[1]
    scale, offset = spread(d, SHARED, groups) * sc, spread(dmin, SHARED, groups) * m
    return codes.to(torch.float32) * spread(scale, group, inputs) - spread(offset, group, inputs)
