"""compressed-tensors: W4A16, W8A16 and FP8 weights; activations are not rounded here."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.quantised.stored.parts import fp8_weight, int4_weight, int8_weight, unpacked
from toolkit.quantised.weight import QuantisedWeight

METHOD = "compressed-tensors"
MARKS = ("weight_packed", "weight_scale")


def read(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> QuantisedWeight:
    """``(code - zero) * scale``; codes packed along the inputs plus half their range, zeros along the outputs."""
    if "weight_g_idx" in tensors:
        raise ToolkitError("actorder of compressed-tensors must not reorder groups, got a weight_g_idx.")
    scale = tensors["weight_scale"]
    if "weight_packed" not in tensors:
        weight = tensors["weight"]
        if weight.dtype == torch.int8:
            _check_symmetric(tensors)
            return int8_weight(
                weight, scale.reshape(-1, 1).expand(len(weight), 1) if scale.numel() == 1 else scale, dtype
            )
        return fp8_weight(weight, scale, dtype)
    outputs, inputs = (int(size) for size in tensors["weight_shape"])
    packed = tensors["weight_packed"]
    bits = 32 // -(-inputs // packed.shape[1])
    if bits not in (4, 8):
        raise ToolkitError(f"num_bits of compressed-tensors must be 4 or 8, got {bits}.")
    codes = unpacked(packed, bits)[:, :inputs]
    if bits == 8:
        _check_symmetric(tensors)
        return int8_weight((codes ^ 128).view(torch.int8), scale, dtype)
    zero = torch.full(scale.shape, 8, dtype=torch.uint8)
    if "weight_zero_point" in tensors:
        stored = tensors["weight_zero_point"]
        zero = unpacked(stored.t(), 4).t()[:outputs] if stored.dtype == torch.int32 else stored + 8
    return int4_weight(codes, zero, scale, dtype)


def _check_symmetric(tensors: Mapping[str, Tensor]) -> None:
    zero = tensors.get("weight_zero_point")
    if zero is not None and bool(zero.any()):
        raise ToolkitError("8-bit integers of compressed-tensors must be symmetric, got zero points.")
