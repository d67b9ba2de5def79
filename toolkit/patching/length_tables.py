"""How a rotary module's tables depend on the length of the longest sequence of a call, found by asking the module."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.patching.probe import device_of, required_arguments, with_forward
from toolkit.patching.thresholds import thresholds
from toolkit.state.rotary_regimes import RotaryRegimes

BUFFER = "inv_freq"
Regimes = dict[str | None, RotaryRegimes | None]
"""Of each layer type which lengths have the same tables; None where all have."""

FARTHEST = 1 << 22
"""No length beyond this one is asked for."""


def layer_types(module: nn.Module) -> list[str | None]:
    """The layer types that the module has frequencies for; [None] where they are for all layers.

    [] for what is no module that makes tables of position_ids.
    """
    kinds = _of_buffers(module)
    if not kinds or "position_ids" not in inspect.signature(type(module).forward).parameters:
        return []
    return kinds if len(required_arguments(module)) <= (2 if kinds == [None] else 3) else []


def _of_buffers(module: nn.Module) -> list[str | None]:
    buffers = [name for name, _ in module.named_buffers(recurse=False) if name.endswith(BUFFER)]
    if BUFFER in buffers:
        return [None]
    return [name.removesuffix(f"_{BUFFER}") for name in buffers if not name.endswith(f"original_{BUFFER}")]


def regimes_of(module: nn.Module) -> Regimes:
    """Of each layer type which lengths have the same tables; {} where the module's tables depend on no length."""
    found = {kind: _find_regimes(module, kind) for kind in layer_types(module)}
    return found if any(found.values()) else {}


def fresh_copy(module: nn.Module) -> Any:
    """A copy with the class's own forward, whose state may change; its configuration is the module's."""
    config = getattr(module, "config", None)
    copied = copy.deepcopy(module, {} if config is None else {id(config): config})
    copied.__dict__.pop("forward", None)
    return copied


def _tensors(tables: Any) -> tuple[Tensor, ...]:
    return (tables,) if isinstance(tables, Tensor) else tuple(tables)


def _ask(copied: nn.Module, length: int, layer_type: str | None) -> tuple[Tensor, ...]:
    """[1, 2, F] tables of positions 0 and 1 beside a position that makes the longest sequence ``length`` tokens."""
    forward = with_forward(copied, type(copied).forward)
    x = torch.zeros(1, 1, 8, device=device_of(copied))
    layer_types = () if layer_type is None else (layer_type,)
    # First the shortest: some modules keep the frequencies of the longest sequence so far until a short one comes.
    for longest in (2, length):
        tables = forward(x, torch.tensor([[0, 1, longest - 1]], device=x.device), *layer_types)
    return tuple(table[:, :2] for table in _tensors(tables))


def _equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, one, other))


def _find_regimes(module: nn.Module, layer_type: str | None) -> RotaryRegimes | None:
    """Which lengths have the same tables; None where all have, or where the module cannot be asked."""
    copied = fresh_copy(module)
    cached: dict[int, tuple[Tensor, ...]] = {}

    def tables(length: int) -> tuple[Tensor, ...]:
        if length not in cached:
            cached[length] = _ask(copied, length, layer_type)
        return cached[length]

    asked = sorted({2, *(at + 1 for at in thresholds(getattr(module, "config", None))), FARTHEST})
    try:
        changed = [at for at in asked if not _equal(tables(2), tables(at))]
        if not changed:
            return None
        other = changed[0]
        same = max(at for at in asked if at < other)
        while other - same > 1:
            middle = (same + other) // 2
            if _equal(tables(2), tables(middle)):
                same = middle
            else:
                other = middle
        steps = all(_equal(tables(other), tables(at)) for at in asked if at > other)
    except Exception:  # not tables of positions: the role's probe says so
        return None
    return RotaryRegimes(borders=(same,)) if steps else RotaryRegimes(varies_after=same)


def frequencies_of(source: str) -> Callable[[nn.Module, int, str | None], tuple[Tensor, float]]:
    """A function of (module, length, layer type): the frequencies [F] and the factor of the tables at that length.

    Args:
        source: the buffer that holds the frequencies once the module was asked, without the layer type.
    """

    def frequencies(module: nn.Module, length: int, layer_type: str | None) -> tuple[Tensor, float]:
        copied = fresh_copy(module)
        first = _ask(copied, max(2, length), layer_type)[0]
        prefix = "" if layer_type is None else f"{layer_type}_"
        cosines = torch.view_as_real(first)[..., 0] if first.is_complex() else first
        scaling = float(cosines.flatten()[0])  # cos(0) is 1
        exact = float(getattr(copied, f"{prefix}attention_scaling", scaling))  # not rounded to float32
        factor = exact if cosines.new_tensor(exact) == scaling else scaling
        return getattr(copied, f"{prefix}{source}").detach().clone(), factor

    return frequencies
