"""int4: unsigned 4-bit codes and zeros in groups of 32, 64 or 128: the values of AWQ, GPTQ and compressed-tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.quantised_linear.packing import grouped, pack_codes, pack_groups, panels, spread, unpack_groups

BITS = 4
CODES = torch.int32
GROUPS = (32, 64, 128)
SCALES = (("scale", "zero"),)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def scale_shapes(
    names: Sequence[str], outputs: int, groups: int
) -> dict[str, tuple[list[int], tuple[torch.dtype, ...]]]:
    shape = [panels(outputs), groups, 16]
    return {"scale": (shape, SCALE_DTYPES), "zero": (shape, (torch.uint8,))}


def values(codes: Tensor, scales: Sequence[Tensor], outputs: int, group: int) -> Tensor:
    scale, zero = (unpack_groups(part, outputs).to(torch.float32) for part in scales)
    inputs = codes.shape[1]
    return (codes.to(torch.float32) - spread(zero, group, inputs)) * spread(scale, group, inputs)


def options(scales: Sequence[Tensor], outputs: int, group: int) -> dict[str, Any]:
    scale, zero = scales
    symmetric = bool((unpack_groups(zero, outputs) == 8).all())
    return {"group": group, "symmetric": symmetric, "scale_dtype": scale.dtype}


def quantise(
    weight: Tensor, *, group: int = 128, symmetric: bool = False, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, list[Tensor]]:
    """Codes round(w / scale) + zero, with the scale as it is stored.

    Args:
        group: 32, 64 or 128.
        symmetric: zero is 8 and the scale 2 amax / 15; else the scale is (max - min) / 15 with 0 inside of the range,
            and zero round(-min / scale).
        scale_dtype: float16, bfloat16 or float32.
    """
    if group not in GROUPS:
        raise ToolkitError(f"group must be one of 32, 64, 128, got {group}.")
    if scale_dtype not in SCALE_DTYPES:
        raise ToolkitError(f"scale_dtype must be float16, bfloat16 or float32, got {scale_dtype}.")
    dense = grouped(weight, group)
    if symmetric:
        span = 2 * dense.abs().amax(2, keepdim=True)
    else:
        lowest = dense.amin(2, keepdim=True).clamp(max=0)
        span = dense.amax(2, keepdim=True).clamp(min=0) - lowest
    stored = (span / 15).to(scale_dtype)
    scale = stored.to(torch.float32)
    divisor = scale.where(scale > 0, 1)
    zero = torch.full_like(scale, 8) if symmetric else (-lowest / divisor).round().clamp(0, 15)
    codes = ((dense / divisor).round() + zero).clamp(0, 15)
    return (
        pack_codes(codes.flatten(1)[:, : weight.shape[1]].to(torch.uint8), BITS),
        [pack_groups(stored.squeeze(2)), pack_groups(zero.squeeze(2).to(torch.uint8))],
    )
