"""int8: signed bytes with a float32 scale per output, the largest magnitude of the row over 127."""

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.ops.quantised_linear.packing import pack_codes, pack_groups, panels, unpack_groups

BITS = 8
CODES = torch.int8
GROUPS: tuple[int, ...] = ()
SCALES = (("scale",),)


def scale_shapes(
    names: Sequence[str], outputs: int, groups: int
) -> dict[str, tuple[list[int], tuple[torch.dtype, ...]]]:
    return {"scale": ([panels(outputs), 1, 16], (torch.float32,))}


def values(codes: Tensor, scales: Sequence[Tensor], outputs: int, group: int) -> Tensor:
    return codes.to(torch.float32) * unpack_groups(scales[0], outputs)


def quantise(weight: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Codes round(w / scale), ties to even."""
    dense = weight.to(torch.float32)
    scale = dense.abs().amax(1, keepdim=True) / 127
    codes = (dense / scale.where(scale > 0, 1)).round().clamp(-127, 127).to(torch.int8)
    return pack_codes(codes, BITS), [pack_groups(scale)]
