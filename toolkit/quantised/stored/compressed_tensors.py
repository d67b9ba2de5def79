"""compressed-tensors: W4A16, W8A16 and FP8 weights, read and written; activations are not rounded here."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.quantised_linear import find
from toolkit.ops.quantised_linear.packing import unpack_codes, unpack_groups
from toolkit.quantised.stored.parts import fp8_weight, int4_weight, int8_weight, packed, unpacked
from toolkit.quantised.weight import QuantisedWeight

METHOD = "compressed-tensors"
MARKS = ("weight_packed", "weight_scale")
HELD = {"int4": "w4a16", "int8": "w8a16", "q8_0": "w8a16", "fp8": "fp8"}
"""By format, the name that the library has for it."""
BLOCK = 128


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


def write(weight: QuantisedWeight) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by what follows the layer's name, the ``weights`` of a ``quantization_config``): ``read`` gives the
    weight again.

    Raises:
        ToolkitError: another format than those of ``HELD``, or what the layout does not have.
    """
    if weight.format not in HELD:
        raise ToolkitError(f"compressed-tensors holds {', '.join(sorted(HELD))}, got {weight.format}.")
    outputs, inputs = weight.shape
    form = find(weight.format)
    codes = unpack_codes(weight.codes, form.bits, outputs, inputs)
    scale = unpack_groups(weight.scales[0], outputs).contiguous()
    kind: dict[str, Any] = {"num_bits": form.bits, "symmetric": True, "dynamic": False, "type": "int"}
    if weight.format == "fp8":
        return {"weight": codes, **_float_scale(scale, kind)}, kind
    group = form.group(weight.scales, inputs)
    if inputs % group:
        raise ToolkitError(f"groups of compressed-tensors must divide the inputs, got {inputs} in groups of {group}.")
    kind |= {"strategy": "group", "group_size": group} if form.groups else {"strategy": "channel", "group_size": None}
    whole = codes.to(torch.int32) + (128 if form.bits == 8 else 0)
    tensors = {"weight_packed": packed(whole, form.bits), "weight_scale": scale}
    tensors["weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
    if weight.format == "int4":
        zero = unpack_groups(weight.scales[1], outputs)
        if not bool((zero == 8).all()):
            if int(zero.max()) > 15:
                raise ToolkitError(f"zeros of compressed-tensors must be <= 15, got {int(zero.max())}.")
            kind["symmetric"] = False
            tensors["weight_zero_point"] = packed(zero.t().to(torch.int32), 4).t().contiguous()
    return tensors, kind


def _float_scale(scale: Tensor, kind: dict[str, Any]) -> dict[str, Tensor]:
    """The scale of float8 codes, of each output or of blocks; ``kind`` says which."""
    kind["type"] = "float"
    blocks = scale[::BLOCK].contiguous()
    if torch.equal(blocks.repeat_interleave(BLOCK, 0)[: len(scale)], scale):
        kind |= {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
        return {"weight_scale": blocks}
    if not torch.equal(scale, scale[:, :1].expand_as(scale)):
        raise ToolkitError(f"float8 codes must have a scale for each output, or for blocks of {BLOCK} x {BLOCK}.")
    kind["strategy"] = "channel"
    return {"weight_scale": scale[:, :1].contiguous()}
