"""Which adapters of a model the rows of a batch may choose."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.modules.moe_experts import moe_experts_of
from toolkit.patching.adapters.embeddings import adapts_embedding
from toolkit.patching.adapters.find import adapter_layers, base_module, wraps_parameter
from toolkit.patching.adapters.follow import AdapterSwitches, is_switch
from toolkit.patching.adapters.fuse import is_fused
from toolkit.patching.adapters.linear import factors_fit, is_fusible
from toolkit.sentences import shown


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the LoRA and DoRA adapters that are in the model, in order."""
    return list(dict.fromkeys(name for module in adapter_layers(model) for name in _names(module)))


def active_adapter(model: nn.Module) -> str | None:
    """The adapter that acts on rows which choose none; None for no adapter. Where one is merged, none acts beside it.

    Raises:
        ToolkitError: several act at once, or one acts in a way that is no row's choice.
    """
    switches = AdapterSwitches(model)
    active = switches.active()
    if not active or (merged_adapters(model) and not _acts_unmerged(model, active)):
        return None
    if len(active) > 1 or not switches.all_apply(active[0]):
        raise ToolkitError(
            f"one adapter at most must be active, unmerged, where rows choose adapters, got {', '.join(active)}."
        )
    return active[0]


def _acts_unmerged(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether one of the adapters acts in a layer that none is merged into: merged ones stand for all there."""
    return any(
        adapts(module, name) or name in (getattr(module, "modules_to_save", None) or ())
        for module in filter(is_switch, model.modules())
        if not getattr(module, "merged_adapters", None)
        for name in names
    )


def merged_adapters(model: nn.Module) -> set[str]:
    """The adapters that are added to weights of the model by ``merge_adapter``, in some layer."""
    return {name for module in adapter_layers(model) for name in getattr(module, "merged_adapters", ())}


def check_choosable(model: nn.Module, name: str) -> None:
    """Raise ToolkitError unless rows may choose the adapter ``name``: every layer that it adapts is a fused one."""
    known = adapter_names(model)
    if name not in known:
        raise unknown_adapter(name, known)
    for path, module in model.named_modules():
        reason = _reason(module, name)
        if reason is not None:
            raise ToolkitError(f"adapter {name!r} must be LoRA or DoRA that rows can choose, but {path} {reason}.")


def unknown_adapter(name: str, known: Sequence[str], none: str = "for a model without adapters") -> ToolkitError:
    """The error of a name that is none of the ``known`` adapters; where there are none, it says when that is so."""
    allowed = f"lora_name must be None {none}, got {shown(name)}."
    return ToolkitError(must_be_one_of("lora_name", name, known) if known else allowed)


def _reason(module: Any, name: str) -> str | None:
    """Why rows cannot choose the adapter ``name`` of a module; None where they can."""
    if wraps_parameter(module):
        if name in module.merged_adapters:
            return "has it merged into its weight; unmerge it first"
        experts = moe_experts_of(base_module(module))
        return "has experts that are not patched" if name in module.lora_A and experts is None else None
    if not is_switch(module):
        return None
    whole = name in (getattr(module, "modules_to_save", None) or ())
    acts = whole or name in _names(module) or (bool(module._active_adapter) and not module._disable_adapters)
    if not is_fused(module):
        return f"is a {type(module).__name__} that runs PEFT's own forward" if acts else None
    if name not in _names(module):
        return None
    if name in getattr(module, "merged_adapters", ()):
        return "has it merged into its weight; unmerge it first"
    if adapts_embedding(module):
        return "has a variant of LoRA" if name in module.lora_variant else None
    if not hasattr(module, "lora_A"):
        return "trains some rows"
    if not is_fusible(module, name, 1):
        return "has a variant of LoRA that is not DoRA, biases, or DoRA with dropout in train mode or over ranks"
    if not factors_fit(module, name, module.base_layer.weight.dtype):
        return f"has factors of a narrower dtype than the layer ({module.lora_A[name].weight.dtype})"
    return None


def adapts(module: nn.Module, name: str) -> bool:
    """Whether a wrapper has the adapter ``name``."""
    return name in _names(module)


def _names(module: Any) -> Iterator[str]:
    for attribute in ("lora_A", "lora_embedding_A", "token_indices"):
        yield from getattr(module, attribute, {})


def check_rows(model: nn.Module, adapters: Sequence[str | None]) -> list[str | None]:
    """The adapter of each sequence of a batch, where some choose one: None is what is active.

    Raises:
        ToolkitError: an adapter that rows cannot choose.
    """
    names: set[str | None] = set(adapters)
    active = active_adapter(model) if None in names else None
    found = [active if name is None else name for name in adapters]
    for name in sorted({name for name in found if name is not None}):
        check_choosable(model, name)
    return found
