"""Adapters of PEFT in a patched model: those of linear layers are fused, those of experts found here, and grouped.

With ``target_parameters`` PEFT wraps a module of experts once for each adapted parameter, and at each forward computes
``W + scaling B A`` of all experts. Here the outermost wrapper's forward hands the factors to the experts' products
instead, row by row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.modules.experts import Experts, layout_of
from toolkit.moe import ExpertAdapters
from toolkit.numerics import Numerics
from toolkit.patching.claim import replace_forward
from toolkit.patching.linear_adapters import fuse_adapters, release_linear_adapters, wraps_parameter
from toolkit.patching.probe import device_of

Factors = tuple[Tensor, Tensor, float]


def inside(module: nn.Module) -> nn.Module:
    """The module in all wrappers of its parameters."""
    return _chain(module)[1]


def _chain(module: nn.Module) -> tuple[list[Any], nn.Module]:
    """The wrappers around a module of experts, outermost first, and that module."""
    wrappers = []
    while wraps_parameter(module):
        wrappers.append(module)
        module = module.base_layer  # type: ignore[assignment]
    return wrappers, module


def _factors(wrapper: Any, transposed: bool) -> Factors | None:
    """a [E, r, in], b [E, out, r] and scaling of a wrapper's active adapters; None where there are none."""
    found = []
    for name in wrapper.active_adapters if not wrapper.disable_adapters else ():
        if name in wrapper.lora_A:
            left, right, scaling = wrapper.get_delta_factors(name)  # W + scaling left @ right, as W lies
            a, b = (left.transpose(1, 2), right.transpose(1, 2)) if transposed else (right, left)
            found.append((a.contiguous(), b.contiguous(), float(scaling)))
    if len(found) < 2:
        return found[0] if found else None
    return torch.cat([a for a, _, _ in found], 1), torch.cat([b * scaling for _, b, scaling in found], 2), 1.0


def _adapters(wrappers: list[Any], parts: Experts) -> ExpertAdapters | None:
    """What the wrappers add to the experts' products; None where one of them does something else."""
    found: dict[str, Factors | None] = {}
    for wrapper in wrappers:
        if wrapper.merged and wrapper.disable_adapters:
            return None  # which takes the merged weights apart first
        if wrapper.parameter_name not in (parts.up, parts.down) or wrapper.parameter_name in found:
            return None
        found[wrapper.parameter_name] = None if wrapper.merged else _factors(wrapper, parts.transposed)
    return ExpertAdapters(found.get(parts.up), found.get(parts.down))


def _forward(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        wrappers, experts = _chain(self)
        parts = layout_of(experts)
        adapters = None if parts is None or kwargs or len(args) != 2 else _adapters(wrappers, parts)
        if parts is None or adapters is None:
            return own(self, x, *args, **kwargs)
        ids, scores = args
        plain = adapters.up is None and adapters.down is None
        return parts.run(experts, x, ids, scores, None if plain else adapters)

    return forward


def adopt_adapters(model: nn.Module, numerics: Numerics | None = None) -> int:
    """Let the adapters in a patched ``model`` run fused, those on experts grouped; how many of the latter there are.

    ``patch`` does so with those that are there, the engine whenever a prompt enters, ``toolkit train`` when it puts
    adapters in. Adapters that are not adopted are right too, at the price of PEFT's own forward.
    numerics: the patch's tier; None is the device's default.
    """
    fuse_adapters(model, numerics or Numerics.choose(None, device_of(model)))
    count = 0
    for module in model.modules():
        if wraps_parameter(module) and layout_of(inside(module)) is not None:
            count += 1
            if "forward" not in module.__dict__:
                replace_forward(module, _forward(type(module).forward))()
    return count


def release_adapters(model: nn.Module) -> None:
    """Give adopted wrappers their own forward back."""
    release_linear_adapters(model)
    for module in model.modules():
        if wraps_parameter(module):
            module.__dict__.pop("forward", None)
