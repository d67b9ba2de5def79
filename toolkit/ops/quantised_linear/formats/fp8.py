"""fp8: float8 e4m3fn with a float32 scale per group of 128 inputs; scales of larger blocks are repeated."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.ops.quantised_linear.packing import pack_codes, pack_groups, panels, spread, unpack_groups

BITS = 8
CODES = torch.float8_e4m3fn
GROUPS = (128,)
SCALES = (("scale",),)
LARGEST = 448.0


def scale_shapes(
    names: Sequence[str], outputs: int, groups: int
) -> dict[str, tuple[list[int], tuple[torch.dtype, ...]]]:
    return {"scale": ([panels(outputs), groups, 16], (torch.float32,))}


def values(codes: Tensor, scales: Sequence[Tensor], outputs: int, group: int) -> Tensor:
    return codes.to(torch.float32) * spread(unpack_groups(scales[0], outputs), group, codes.shape[1])


def quantise(weight: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Blocks of 128 x 128 share the scale amax / 448."""
    outputs, inputs = weight.shape
    dense = weight.to(torch.float32)
    blocks = F.pad(dense, (0, -inputs % 128, 0, -outputs % 128)).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    scale = (blocks.abs().amax((1, 3)) / LARGEST).repeat_interleave(128, dim=0)[:outputs]
    scaled = dense / spread(scale.where(scale > 0, 1), 128, inputs)
    return pack_codes(scaled.clamp(-LARGEST, LARGEST).to(CODES), BITS), [pack_groups(scale)]
