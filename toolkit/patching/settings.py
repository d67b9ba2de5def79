"""What a claim goes by that a user may change later: attributes of a module that its replacement does not read again.

A replacement is proven with the settings of then (top-k, window, activation). It reads again what it can, and checks
the rest at every call; captured decode graphs, which run no Python, are dropped when any setting of the model changes.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import nn

from toolkit.errors import ToolkitError
from toolkit.ops.hooks import watched
from toolkit.patching.attention_configs import FIELD, attention_configs

Settings = tuple[tuple[str, Any], ...]
"""Dotted names of attributes of a module, and their values."""

_KINDS = (bool, int, float, str, type(None), tuple, list)
_CLASS = ".__class__"
_SWITCHES = {"training", "forward", "layer_idx", "gradient_checkpointing", "applied_pre_backward_ref_cnt"}
"""Attributes that say how a call runs and not what it computes, and that forwards read again. The last one and those
that begin with ``ds_`` are what DeepSpeed's hooks count on modules while it trains."""
_MASKS = ("sliding_window", "attention_chunk_size", "is_causal")
"""Fields of a configuration by which transformers makes masks."""


def settings_of(module: nn.Module, read_again: Iterable[str] = ()) -> Settings:
    """The settings of a module, of its children without parameters, and those of its configuration that it reads.

    Args:
        read_again: attributes that the replacement reads at every call.
    """
    found = dict(map(_unbound, _own(module, {*_SWITCHES, *read_again})))
    for name, child in module.named_children():
        if next(chain(child.parameters(), child.buffers()), None) is None and not isinstance(child, nn.Dropout):
            found[f"{name}{_CLASS}"] = type(child)
            found |= {f"{name}.{key}": value for key, value in map(_unbound, _own(child, _SWITCHES))}
    return (*found.items(), *_of_configuration(module, inspect.unwrap(type(module).forward).__code__.co_names))


def mask_settings(module: nn.Module) -> Settings:
    """The fields of a module's configuration by which its masks are made."""
    return _of_configuration(module, ("config", *_MASKS))


def _own(module: nn.Module, left_out: set[str]) -> Iterator[tuple[str, Any]]:
    for name, value in module.__dict__.items():
        if name in left_out or name.startswith(("_", "ds_")) or "dropout" in name:
            continue
        if type(value) in _KINDS or inspect.isroutine(value):
            yield name, _copied(value)


def _unbound(setting: tuple[str, Any]) -> tuple[str, Any]:
    """A bound method by its function, which a copy of the module has too."""
    name, value = setting
    return (f"{name}.__func__", value.__func__) if inspect.ismethod(value) else setting


def _of_configuration(module: nn.Module, names: Iterable[str]) -> Settings:
    config, names = module.__dict__.get("config"), set(names)
    if config is None or "config" not in names:
        return ()
    names = {name for name in names if not name.startswith(("_", "output_", "use_", "return_"))}
    fields = (
        (name, getattr(config, name)) for name in sorted(names) if "dropout" not in name and hasattr(config, name)
    )
    return tuple((f"config.{name}", _copied(value)) for name, value in fields if type(value) in _KINDS)


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def guarded(forward: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """``forward`` that raises ToolkitError where a module's settings are not those that it was proven with.

    A child without parameters is part of what ``forward`` computes, and not called: while it has hooks, the module runs
    the forward of its class.
    """
    if not settings:
        return forward
    names, values = [name for name, _ in settings], tuple(value for _, value in settings)
    read = attrgetter(*names, names[0])  # of one name it would return no tuple
    expected = (*values, values[0])
    parts = [name.removesuffix(_CLASS) for name in names if name.endswith(_CLASS)]

    def checked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        same = _traced(self, settings) if torch.compiler.is_compiling() else read(self) == expected
        if not same:
            raise ToolkitError(f"{changed_settings(self, settings)[0]}; call toolkit.patch(model) again.")
        for name in parts:
            if watched(attrgetter(name)(self)):
                return type(self).forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    functools.update_wrapper(checked, forward)
    checked.settings = settings  # type: ignore[attr-defined]
    return checked


def _traced(module: Any, settings: Settings) -> bool:
    """Whether a module has ``settings``, read so that a tracer can follow: what it read becomes a guard."""
    for name, value in settings:
        found = module
        for part in name.split("."):
            found = type(found) if part == "__class__" else getattr(found, part)
        if found != value:
            return False
    return True


def changed_settings(module: nn.Module, settings: Settings) -> list[str]:
    """A sentence for each of ``settings`` that a module no longer has."""
    found = []
    for name, value in settings:
        try:
            now = attrgetter(name)(module)
        except AttributeError:
            now = "none"
        if now != value:
            was, now = (one.__name__ if isinstance(one, type) else repr(one) for one in (value, now))
            whose = f"{name} of {type(module).__name__}"
            found.append(f"{whose} must be {was}, as it was when the model was patched, got {now}")
    return found


class ModelSettings:
    """The settings of modules of a model, to be compared with later ones: tens of nanoseconds per setting.

    Args:
        model: whose configurations are looked at.
        modules: of the model; None for all.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module] | None = None) -> None:
        # The sizes of torch's own layers are those of their weights.
        sized = (nn.Linear, nn.Embedding)
        modules = [one for one in (model.modules() if modules is None else modules) if type(one) not in sized]
        entries = [(module.__dict__, key, value) for module in modules for key, value in _own(module, _SWITCHES)]
        for config in attention_configs(model):
            entries += [(config.__dict__, key, _copied(config.__dict__.get(key))) for key in (FIELD, *_MASKS)]
        self._holders, self._keys = [entry[0] for entry in entries], [entry[1] for entry in entries]
        self._values = [entry[2] for entry in entries]

    @property
    def dicts(self) -> list[dict[str, Any]]:
        """Those that are read, each once; kept alive by this object."""
        return list({id(holder): holder for holder in self._holders}.values())

    def changed(self) -> bool:
        """Whether an attribute was set to something else since this object was made."""
        return list(map(dict.get, self._holders, self._keys)) != self._values

    def __eq__(self, other: object) -> bool:
        """Whether both are the same settings of the same modules."""
        if not isinstance(other, ModelSettings):
            return NotImplemented
        same = len(self._holders) == len(other._holders) and not any(map(is_not, self._holders, other._holders))
        return same and self._keys == other._keys and self._values == other._values

    __hash__ = None  # type: ignore[assignment]
