"""Every way in which the weights of a model are written, as small random writes: what a weight version must see."""

import copy
import ctypes
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.patching import weights_changed
from toolkit.patching.adapters import adapter_layers
from toolkit.quantised import QuantisedWeight, quantised_weights

WeightWrite = Callable[[Any, random.Random], None]
"""Writes weights of a model; the generator chooses where."""


class PointerSGD(torch.optim.Optimizer):
    """Gradient descent that writes through raw pointers, as bitsandbytes does: torch's counters do not move."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    new = (parameter - group["lr"] * parameter.grad).contiguous()
                    ctypes.memmove(parameter.data_ptr(), new.data_ptr(), new.numel() * new.element_size())


class MasterCopySGD(torch.optim.Optimizer):
    """Gradient descent on float64 copies, written back by ``data.copy_``, as with master weights."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        self.parameters = list(params)
        super().__init__([parameter.detach().clone().double() for parameter in self.parameters], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for copied, parameter in zip(self.param_groups[0]["params"], self.parameters, strict=True):
            if parameter.grad is not None:
                copied -= self.param_groups[0]["lr"] * parameter.grad.double()
                parameter.data.copy_(copied)


def _noise(like: Tensor, source: random.Random) -> Tensor:
    generator = torch.Generator().manual_seed(source.randrange(2**31))
    return 0.1 * torch.randn(like.shape, generator=generator).to(like) * (like.detach().abs().mean() + 0.01)


def _any_parameter(model: Any, source: random.Random) -> tuple[nn.Module, str, nn.Parameter]:
    """A trained or base parameter, of a dense matrix."""
    found = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if _is_dense_matrix(parameter)
    ]
    return source.choice(found)


def _is_dense_matrix(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.dim() > 1 and not isinstance(parameter, QuantisedWeight)


def _optimizer(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> WeightWrite:
    def write(model: Any, source: random.Random) -> None:
        dense = [one for one in model.parameters() if not isinstance(one, QuantisedWeight)]
        parameters = [one for one in dense if one.requires_grad] or dense
        optimizer = make(parameters)
        for parameter in parameters:
            parameter.grad = _noise(parameter, source)
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    return write


def _load(assign: bool) -> WeightWrite:
    def write(model: Any, source: random.Random) -> None:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        for value in state.values():
            if value.is_floating_point() and not isinstance(value, QuantisedWeight):
                value += _noise(value, source)
        model.load_state_dict(state, assign=assign)
        if assign and getattr(model.config, "tie_word_embeddings", False):
            model.tie_weights()

    return write


def _in_place(model: Any, source: random.Random) -> None:
    parameter = _any_parameter(model, source)[2]
    with torch.no_grad():
        parameter.add_(_noise(parameter, source))


def _data_copy(model: Any, source: random.Random) -> None:
    parameter = _any_parameter(model, source)[2]
    parameter.data.copy_(parameter.detach() + _noise(parameter, source))


def _data_row(model: Any, source: random.Random) -> None:
    parameter = _any_parameter(model, source)[2]
    parameter.data[0] += _noise(parameter[0], source)
    weights_changed(model)  # nothing shows a write to a part, past the counters


def _data_replaced(model: Any, source: random.Random) -> None:
    parameter = _any_parameter(model, source)[2]
    for _ in range(2):  # the second memory may be where the first was
        parameter.data = parameter.data + _noise(parameter, source)


def _data_viewed(model: Any, source: random.Random) -> None:
    """The same memory of a matrix by other strides, at the same address."""
    parameter = source.choice([one for one in model.parameters() if one.dim() == 2 and _is_dense_matrix(one)])
    rows, columns = parameter.shape
    parameter.data = parameter.data.as_strided(
        (rows, columns), (1, rows) if parameter.is_contiguous() else (columns, 1)
    )


def _parameter_replaced(model: Any, source: random.Random) -> None:
    module, name, parameter = _any_parameter(model, source)
    setattr(module, name, nn.Parameter(parameter.detach() + _noise(parameter, source), parameter.requires_grad))


def _entry_replaced(model: Any, source: random.Random) -> None:
    module, name, parameter = _any_parameter(model, source)
    module._parameters[name] = nn.Parameter(parameter.detach() + _noise(parameter, source), parameter.requires_grad)


def _module_replaced(model: Any, source: random.Random) -> None:
    parents = [(parent, name) for parent in model.modules() for name, child in parent.named_children() if _leaf(child)]
    parent, name = source.choice(parents)
    child = copy.deepcopy(parent._modules[name])
    assert child is not None
    with torch.no_grad():
        child.weight.add_(_noise(child.weight, source))
    setattr(parent, name, child)


def _leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None and _is_dense_matrix(module._parameters.get("weight"))


def _buffers(model: Any) -> list[tuple[nn.Module, str, Tensor]]:
    """Buffers that are saved: biases of routers."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in module._buffers.items()
        if value is not None and value.is_floating_point() and name not in module._non_persistent_buffers_set
    ]


def _buffer_in_place(model: Any, source: random.Random) -> None:
    for _, _, value in _buffers(model):
        value.add_(_noise(value, source))


def _buffer_replaced(model: Any, source: random.Random) -> None:
    for module, name, value in _buffers(model):
        setattr(module, name, value + _noise(value, source))


def _embeddings_tied(model: Any, source: random.Random) -> None:
    """The head's weight becomes the embedding's, or a separate one again."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    head.weight = nn.Parameter(head.weight.detach().clone()) if tied else embedding.weight
    with torch.no_grad():
        head.weight.add_(_noise(head.weight, source))


def _quantised_again(model: Any, source: random.Random) -> None:
    """A quantised weight is made of other numbers, and stands in the place of the one before."""
    name, weight = source.choice(list(quantised_weights(model)))
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, nn.Parameter(_changed(weight, source), requires_grad=False))


def _codes_copied(model: Any, source: random.Random) -> None:
    """The codes and scales of a quantised weight are written in place."""
    weight = source.choice(list(quantised_weights(model)))[1]
    with torch.no_grad():
        weight.copy_(_changed(weight, source))


def _changed(weight: QuantisedWeight, source: random.Random) -> QuantisedWeight:
    dense = weight.dequantise()
    return QuantisedWeight.of(dense + _noise(dense, source), weight.format)


def _adapter_written(model: Any, source: random.Random) -> None:
    layer = source.choice(adapter_layers(model))
    factors = [one for name, one in layer.named_parameters() if not name.startswith("base_layer.")]
    with torch.no_grad():
        for factor in factors:
            factor.add_(_noise(factor, source))


def _adapter_rescaled(model: Any, source: random.Random) -> None:
    factor = source.choice([0.8, 1.25])
    for layer in adapter_layers(model):
        for name in getattr(layer, "scaling", {}):
            layer.scaling[name] *= factor


def _adapter_chosen(model: Any, source: random.Random) -> None:
    """Another adapter of those that every wrapper has."""
    layers = [layer for layer in adapter_layers(model) if hasattr(layer, "r")]
    active = set(layers[0].active_adapters)
    name = source.choice(sorted(set(layers[0].r) - active) or sorted(active))
    for layer in layers:
        layer.set_adapter(name)


def _adapters_toggled(model: Any, source: random.Random) -> None:
    enabled = any(layer.disable_adapters for layer in adapter_layers(model))
    for layer in adapter_layers(model):
        layer.enable_adapters(enabled)


def _adapters_merged(model: Any, source: random.Random) -> None:
    for layer in adapter_layers(model):
        if layer.merged:
            layer.unmerge()
        else:
            layer.merge()


_WRITES: dict[str, WeightWrite] = {
    "AdamW": _optimizer(lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True)),
    "fused AdamW": _optimizer(lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True)),
    "an optimizer with pointers": _optimizer(PointerSGD),
    "an optimizer with master weights": _optimizer(MasterCopySGD),
    "load_state_dict": _load(assign=False),
    "load_state_dict(assign=True)": _load(assign=True),
    "p.add_": _in_place,
    "p.data.copy_": _data_copy,
    "p.data[0] +=, weights_changed": _data_row,
    "p.data =": _data_replaced,
    "p.data = another view": _data_viewed,
    "module.weight = Parameter": _parameter_replaced,
    "module._parameters[...] =": _entry_replaced,
    "a module replaced": _module_replaced,
}
_OF_BUFFERS: dict[str, WeightWrite] = {"a buffer in place": _buffer_in_place, "a buffer replaced": _buffer_replaced}
_OF_QUANTISED: dict[str, WeightWrite] = {
    "a weight quantised again": _quantised_again,
    "codes copied": _codes_copied,
}
_MERGED = "adapters merged or unmerged"
_OF_ADAPTERS: dict[str, WeightWrite] = {
    "an adapter written": _adapter_written,
    "another adapter": _adapter_chosen,
    "adapters rescaled": _adapter_rescaled,
    "adapters switched on or off": _adapters_toggled,
    _MERGED: _adapters_merged,
}


def weight_writes(model: Any) -> dict[str, WeightWrite]:
    """The ways in which weights of ``model`` can be written, by name."""
    found = dict(_WRITES)
    if _buffers(model):
        found |= _OF_BUFFERS
    quantised = any(quantised_weights(model))
    if quantised:
        found |= _OF_QUANTISED
    if adapter_layers(model):
        found |= _OF_ADAPTERS
        if quantised:
            del found[_MERGED]  # merging writes weights in place
        return found
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedding = model.get_input_embeddings()
    if head is not None and getattr(head, "weight", None) is not None and head.weight.shape == embedding.weight.shape:
        found["embeddings tied or untied"] = _embeddings_tied
    return found


# PEFT refuses adapters on the layer whose weight these models' fused kernels read themselves.
_READ_OUT_PROJ = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


def with_embedding_adapters(model: Any) -> Any:
    """``model`` with two LoRA adapters of PEFT's, on its projections and on its embedding; changed in place.

    The caller's random state does not change.
    """
    import peft

    embedding = model.get_input_embeddings()
    output = model.get_output_embeddings()
    targets = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if module is embedding or (type(module) is nn.Linear and module is not output)
    }
    if model.config.model_type in _READ_OUT_PROJ:
        targets -= {"out_proj"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in ("first", "second"):
            config = peft.LoraConfig(r=4, target_modules=sorted(targets), init_lora_weights=False)
            if name == "first":
                adapted = peft.get_peft_model(model, config, adapter_name=name)
            else:
                adapted.add_adapter(name, config)
    return adapted.eval()
