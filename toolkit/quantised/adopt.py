"""Layers that another library has quantised become linear layers with a ``QuantisedWeight``."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.quantised.stored import Library, libraries
from toolkit.quantised.stored.parts import int4_weight, int8_weight
from toolkit.quantised.weight import QuantisedWeight


def settings_of(config: Any) -> dict[str, Any]:
    """A configuration's ``quantization_config`` as a dictionary; empty where it has none."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return {}
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def library_of(settings: Mapping[str, Any]) -> Library | None:
    """The library whose layout ``settings`` describe; None for another one."""
    method = settings.get("quant_method")
    return libraries().get(str(getattr(method, "value", method)).replace("_", "-"))


def adopt(model: nn.Module) -> dict[str, QuantisedWeight]:
    """The weights, by the name of their parameter, of the layers that another library quantised; in place.

    Each such layer becomes an ``nn.Linear``, whose weight has the values that the library dequantises to.

    Raises:
        ToolkitError: a layer in a layout that no format holds.
    """
    settings = settings_of(getattr(model, "config", None))
    found: dict[str, QuantisedWeight] = {}
    for path, module in list(model.named_modules()):
        weight = _weight_of(path, module, settings)
        if weight is None:
            continue
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, plain_linear(weight, getattr(module, "bias", None)))
        found[f"{path}.weight"] = weight
    if found:
        forget_quantiser(model)
    return found


def forget_quantiser(model: Any) -> None:
    """Remove what transformers keeps of the library: it would refuse to move, train or save the model."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(name, None)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def plain_linear(weight: QuantisedWeight, bias: Tensor | None) -> nn.Linear:
    """A linear layer with this weight."""
    outputs, inputs = weight.shape
    made = nn.Linear(inputs, outputs, bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    kept = None if bias is None else nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    made.register_parameter("bias", kept)
    return made


def _weight_of(path: str, module: nn.Module, settings: Mapping[str, Any]) -> QuantisedWeight | None:
    """The weight of a quantised layer; None for another module."""
    if next(module.children(), None) is not None:
        return None
    try:
        inside = _of_tensor(getattr(module, "weight", None))
        if inside is not None:
            return inside
        tensors = {name: one.detach() for name, one in module.state_dict().items() if isinstance(one, Tensor)}
        library = next(_libraries_of(tensors, settings), None)
        return None if library is None else library.read(settings, tensors, _dtype(module, tensors))
    except ToolkitError as error:
        raise ToolkitError(f"layer {path} cannot be adopted: {error}") from None


def _libraries_of(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Iterator[Library]:
    named = library_of(settings)
    for library in libraries().values() if named is None else [named]:
        if any(mark in tensors for mark in library.marks):
            yield library


def _dtype(module: Any, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """What a layer computes in."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    for found in (getattr(state, "dtype", None), getattr(module, "compute_dtype", None)):
        if found is not None:
            return found  # type: ignore[no-any-return]
    floats = [one.dtype for one in tensors.values() if one.is_floating_point() and one.itemsize == 2]
    return floats[0] if floats else torch.float32


def _of_tensor(weight: Any) -> QuantisedWeight | None:
    """Of torchao's tensors in plain linear layers: weight-only integers of 8 or 4 bits."""
    if not type(weight).__module__.startswith("torchao."):
        return None
    name = type(weight).__name__
    codes, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    zero = getattr(weight, "zero_point", None)
    if name not in ("Int8Tensor", "IntxUnpackedToInt8Tensor") or codes is None or scale is None:
        raise ToolkitError(f"torchao's tensors must be Int8Tensor or IntxUnpackedToInt8Tensor, got {name}.")
    scale = scale.reshape(len(codes), -1)
    if str(getattr(weight, "target_dtype", None)) == "torch.int4":  # stored as int8 from -8 to 7
        shifted = torch.zeros_like(scale) if zero is None else zero.reshape(scale.shape)
        return int4_weight(codes + 8, shifted + 8, scale, weight.dtype)
    if zero is not None and bool(zero.any()):
        raise ToolkitError(f"zero points of torchao's {name} must be 0, got others.")
    return int8_weight(codes, scale, weight.dtype)
