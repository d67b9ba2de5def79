"""A copy of a model with one layer of each kind, which is cheap to run and whose modules may change.

Of every list of layers the first of each kind is copied. The others are left out: in their place the hidden states
pass as they are, in the form in which the copied layer returned its own.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.patching.adapters import vocabulary_size
from toolkit.patching.probe import generator, signature_key
from toolkit.patching.record import PatchRecord, record_of

HIDDEN = ("hidden_states", "x")


class LeftOut(nn.Module):
    """Stands where a layer was left out that is of the kind of ``first``, a layer before it, which is copied.

    It has the attributes of the layer, and the modules, parameters and configuration of ``first``: whoever changes the
    configurations of a copy must not find those of the model.
    """

    def __init__(self, layer: nn.Module, first: "_Copied") -> None:
        super().__init__()
        kept = {name: value for name, value in layer.__dict__.items() if not name.startswith("_") and name != "config"}
        self.__dict__.update(kept)
        self.__dict__["forward"] = self.passed_on
        self.__dict__["first"] = first

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["first"].module, name)

    def passed_on(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else next(kwargs[name] for name in HIDDEN if name in kwargs)
        returned = self.__dict__["first"].returned
        if returned is None or isinstance(returned, Tensor):
            return hidden
        return type(returned)((hidden, *returned[1:]))


class _Copied:
    """The copy of a layer, and what it returned last."""

    def __init__(self) -> None:
        self.module: Any = None
        self.returned: Any = None

    def take(self, module: nn.Module) -> None:
        self.module = module
        module.register_forward_hook(lambda *call: setattr(self, "returned", call[-1]))


def _kinds(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The first layer of each kind in every list of layers, and the later ones of that kind."""
    found: dict[nn.Module, list[nn.Module]] = {}
    per_layer = _entries(getattr(model, "config", None))
    for layers in model.modules():
        if not isinstance(layers, nn.ModuleList) or len(layers) < 2:
            continue
        firsts: dict[Any, nn.Module] = {}
        for at, layer in enumerate(layers):
            settings = repr([entries[at] for entries in per_layer if len(entries) == len(layers)])
            first = firsts.setdefault((signature_key(layer), settings), layer)
            if first is not layer:
                found.setdefault(first, []).append(layer)
    return found


def _entries(config: Any) -> list[list[Any]]:
    """The lists of a configuration and of those in it, of which some have one entry per layer."""
    if config is None:
        return []
    values = list((config if isinstance(config, dict) else vars(config)).values())
    nested = [one for one in values if isinstance(one, dict) or hasattr(one, "to_dict")]
    return [one for one in values if isinstance(one, list)] + [entry for one in nested for entry in _entries(one)]


def skeleton(model: Any, replaced: Mapping[nn.Module, nn.Module] | None = None, random: bool = False) -> Any:
    """The copy. Its modules are found under the paths that they have in ``model``, left-out layers included.

    Args:
        replaced: modules that stand in the copy in the place of others.
        random: whether its parameters are float32 random numbers of unit scale, of few tokens of the vocabulary, and
            its own; else floating-point ones are the model's, and no other memory than that of buffers is allocated.

    Raises what copying a module raises, where a library's layers cannot be copied.
    """
    memo: dict[int, Any] = {id(old): new for old, new in (replaced or {}).items()}
    copies: dict[nn.Module, _Copied] = {}
    for first, others in _kinds(model).items():
        copies[first] = _Copied()
        for layer in others:
            memo.setdefault(id(layer), LeftOut(layer, copies[first]))
    rows = vocabulary_size(model) if random else 0
    for module in list(_kept(model, memo)):
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and id(parameter) not in memo:
                memo[id(parameter)] = _random(parameter, rows, len(memo)) if random else parameter
    record = record_of(model)
    if record is not None:  # its undo steps are not for copies, and would copy the layers that are left out
        memo[id(record)] = PatchRecord(record.report, record.roles, (), None)
    copied = copy.deepcopy(model, memo)
    for first, holder in copies.items():
        if id(first) in memo:
            holder.take(memo[id(first)])
    if not random:
        return copied
    for module in copied.modules():
        if isinstance(module, nn.Embedding) and (module.padding_idx or 0) >= module.weight.shape[0]:
            module.padding_idx = None
    return copied.float()


def _kept(module: nn.Module, memo: Mapping[int, Any]) -> Any:
    """The modules that are copied."""
    if id(module) in memo:
        return
    yield module
    for child in module.children():
        yield from _kept(child, memo)


FEW_TOKENS = 256


def _random(parameter: Tensor, vocabulary: int, stream: int) -> nn.Parameter:
    shape = list(parameter.shape)
    if len(shape) == 2 and shape[0] == vocabulary:
        shape[0] = min(shape[0], FEW_TOKENS)
    made = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=parameter.device))
    scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
    with torch.no_grad():
        return made.normal_(0.0, scale, generator=generator(parameter.device, stream))  # type: ignore[return-value]
