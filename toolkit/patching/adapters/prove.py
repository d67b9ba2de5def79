"""Is a wrapper of a linear layer LoRA or DoRA? Its fused forward is compared with PEFT's own on a probe copy."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from toolkit.patching.adapters.linear import fused_linear, is_fusible
from toolkit.patching.claim import ProbeError
from toolkit.patching.probe import compare, probe_copy, random_input, with_forward
from toolkit.patching.search import prove

PARTS = ("lora_A", "lora_B", "lora_dropout", "scaling", "active_adapters", "disable_adapters", "merged")
"""Attributes that the fused forward reads."""


def proven_forward(module: Any) -> Callable[..., Any] | str:
    """The fused forward of a wrapper, or the reason why PEFT's own stays."""
    missing = [name for name in PARTS if not hasattr(module, name)]
    if missing:
        return f"it has no {missing[0]}"
    if type(module.base_layer) is not nn.Linear:
        return f"it wraps a {type(module.base_layer).__name__}, not nn.Linear"
    own = type(module).forward
    found = prove([("lora_linear", fused_linear(own), partial(_probe, module, own))])
    return found if isinstance(found, str) else found[1]


def _probe(module: nn.Module, own: Callable[..., Any]) -> ProbeError:
    copied: Any = probe_copy(module)
    active = [name for name in copied.active_adapters if name in copied.lora_A]
    for name in active:
        if not is_fusible(copied, name, len(active)):
            raise NotImplementedError(f"adapter {name!r} is neither plain LoRA nor DoRA alone")
    x = random_input(2, 3, copied.base_layer.in_features, like=copied)
    return compare(with_forward(copied, fused_linear(own)), with_forward(copied, own), [[x]], list(copied.parameters()))
