"""Which adapters act in a model, and what belongs to them.

PEFT switches, merges and rescales adapters without writing a parameter; a module that it switches so is a *switch*: a
wrapper around an adapted layer, or around a module that is trained as a whole or for some tokens.
"""

from collections import defaultdict
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from torch import nn

# What a switch does besides its parameters.
_STATE = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
# Children of a switch that belong to the base model, or are switches around it.
_BASE = ("base_layer", "original_module", "token_adapter")


def is_switch(module: nn.Module) -> bool:
    """Whether PEFT switches the module between adapters and without one."""
    return hasattr(module, "_active_adapter") and hasattr(module, "_disable_adapters")


def base_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of the model without its adapters, in order; shared ones as often as they are used."""
    switch = is_switch(model)
    if not switch:
        yield model
    for name, child in model._modules.items():
        if child is not None and (name in _BASE or not switch):
            yield from base_modules(child)


def adapter_entries(model: nn.Module) -> dict[tuple[int, str], str]:
    """The adapter that a tensor belongs to, by the id of the dict that holds the tensor and its name there."""
    found: dict[tuple[int, str], str] = {}
    for switch in filter(is_switch, model.modules()):
        for path in (*switch.adapter_layer_names, *switch.other_param_names):  # type: ignore[misc]
            container = _attribute(switch, path)
            if not isinstance(container, nn.Module):
                continue
            for entries in (container._parameters, container._buffers):
                found |= {(id(entries), name): name for name in entries}
            for adapter, part in container._modules.items():
                for module in part.modules() if part is not None else ():
                    for entries in (module._parameters, module._buffers):
                        found |= {(id(entries), name): adapter for name in entries}
    return found


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


class AdapterSwitches:
    """The state of a model's switches, to be compared with a later one."""

    def __init__(self, model: nn.Module) -> None:
        by_names: dict[tuple[str, ...], list[nn.Module]] = defaultdict(list)
        for switch in filter(is_switch, model.modules()):
            by_names[tuple(name for name in _STATE if hasattr(switch, name))].append(switch)
        self._switches = [(names, attrgetter(*names), switches) for names, switches in by_names.items()]
        self._state = self._copied()

    def _read(self) -> list[tuple[Any, ...]]:
        return [state for _, read, switches in self._switches for state in map(read, switches)]

    def _copied(self) -> list[tuple[Any, ...]]:
        return [tuple(map(_copy, state)) for state in self._read()]

    def changed(self) -> bool:
        """Whether an adapter was switched, merged or rescaled since this object was made."""
        return self._read() != self._state

    def may_have_merged(self, now: "AdapterSwitches") -> bool:
        """Whether base weights may have been written between this state and ``now``, which leaves no other trace.

        Merging and unmerging write them past torch's version counters; a switch that is gone may have been merged.
        """
        old, new = self._of("merged_adapters"), now._of("merged_adapters")
        return len(new) < len(old) or list(filter(None, old)) != list(filter(None, new))

    def active(self) -> list[str]:
        """The adapters that are active in some switch, in order."""
        pairs = zip(self._of("_active_adapter"), self._of("_disable_adapters"))
        names = [[active] if isinstance(active, str) else active for active, disabled in pairs if not disabled]
        return list(dict.fromkeys(name for some in names for name in some))

    def selection(self) -> tuple[Any, ...]:
        """What decides what the active adapters add, beside their tensors."""
        return tuple(self._of(name) for name in _STATE)

    def scaling_of(self, adapter: str) -> tuple[Any, ...]:
        """The factor of an adapter in each switch that has it."""
        return tuple(
            scaling.get(adapter)
            for names, _, switches in self._switches
            for switch in (switches if "scaling" in names else ())
            if isinstance(scaling := switch.scaling, dict)
        )

    def all_apply(self, adapter: str) -> bool:
        """Whether every switch applies this adapter alone, unmerged."""
        active = self._of("_active_adapter")
        return all(one in (adapter, (adapter,)) for one in active) and not any(
            (*self._of("_disable_adapters"), *self._of("merged_adapters"))
        )

    def _of(self, name: str) -> tuple[Any, ...]:
        names = [names for names, _, switches in self._switches for _ in switches]
        return tuple(
            _hashable(state[have.index(name)]) for have, state in zip(names, self._state, strict=True) if name in have
        )


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict)) else value


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else tuple(value.items()) if isinstance(value, dict) else value
