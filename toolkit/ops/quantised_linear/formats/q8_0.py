"""q8_0: signed bytes in groups of 32 with a float16 scale, the values of GGUF's Q8_0."""

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.ops.quantised_linear.packing import grouped, pack_codes, pack_groups, panels, spread, unpack_groups

BITS = 8
CODES = torch.int8
GROUPS = (32,)
SCALES = (("scale",),)


def scale_shapes(
    names: Sequence[str], outputs: int, groups: int
) -> dict[str, tuple[list[int], tuple[torch.dtype, ...]]]:
    return {"scale": ([panels(outputs), groups, 16], (torch.float16,))}


def values(codes: Tensor, scales: Sequence[Tensor], outputs: int, group: int) -> Tensor:
    scale = unpack_groups(scales[0], outputs).to(torch.float32)
    return codes.to(torch.float32) * spread(scale, group, codes.shape[1])


def quantise(weight: Tensor) -> tuple[Tensor, list[Tensor]]:
    """As GGUF rounds: w times the float32 inverse of amax / 127, ties away from zero; the scale is rounded after.

    A float16 scale holds weights up to 8e6.
    """
    dense = grouped(weight, 32)
    scale = dense.abs().amax(2, keepdim=True) / 127
    scaled = dense * (1 / scale).where(scale > 0, 0)
    whole = scaled.trunc()
    codes = whole + (scaled - whole).abs().ge(0.5) * scaled.sign()
    return (
        pack_codes(codes.flatten(1)[:, : weight.shape[1]].to(torch.int8), BITS),
        [pack_groups(scale.squeeze(2).to(torch.float16))],
    )
