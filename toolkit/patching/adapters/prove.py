"""Is a wrapper of a linear layer LoRA or DoRA? Its fused forward is compared with PEFT's own on a probe copy."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import skip_init

from toolkit.modules.tensor_parallel import split_of_forward
from toolkit.patching.adapters.linear import fused_linear, is_fusible
from toolkit.patching.claim import ProbeError
from toolkit.patching.conditions import error_of
from toolkit.patching.probe import generator, random_input
from toolkit.patching.search import prove

PARTS = ("lora_A", "lora_B", "lora_dropout", "scaling", "active_adapters", "disable_adapters", "merged")
"""Attributes that the fused forward reads."""


def proven_forward(module: Any, head: bool = False) -> Callable[..., Any] | str:
    """The fused forward of a wrapper, which may be the model's ``head``, or the reason why PEFT's own stays."""
    missing = [name for name in PARTS if not hasattr(module, name)]
    if missing:
        return f"it has no {missing[0]}"
    if type(module.base_layer) is not nn.Linear:
        return f"it wraps a {type(module.base_layer).__name__}, not nn.Linear"
    own = type(module).forward
    found = prove([("lora_linear", fused_linear(own, head), partial(_probe, _of_one_rank(module), own))])
    return found if isinstance(found, str) else found[1]


def _of_one_rank(module: Any) -> Any:
    """The wrapper; where its layer is split over ranks a copy of it around a random one that is not."""
    layer = module.base_layer
    if split_of_forward(layer) is None:
        return module
    weight = layer.weight
    whole = skip_init(nn.Linear, layer.in_features, layer.out_features, layer.bias is not None, dtype=weight.dtype)
    whole.to_empty(device=weight.device)
    source = generator(weight.device)
    for parameter in whole.parameters():
        parameter.data.normal_(0.0, layer.in_features**-0.5, generator=source)
        parameter.requires_grad_(weight.requires_grad)
    copied = copy.copy(module)
    copied._modules = {**module._modules, "base_layer": whole}
    return copied


def _probe(module: Any, own: Callable[..., Any]) -> ProbeError:
    width = module.base_layer.in_features

    def batches(copied: Any) -> list[list[Tensor]]:
        active = [name for name in copied.active_adapters if name in copied.lora_A]
        if not active and not copied.disable_adapters:  # adapters that rows choose
            copied._active_adapter = active = list(copied.lora_A)[:1]
        for name in active:
            if not is_fusible(copied, name, len(active), evaluates=True):
                raise NotImplementedError(f"adapter {name!r} is neither plain LoRA nor DoRA alone")
        return [[random_input(2, 3, width, like=copied)]]

    return error_of(module, fused_linear(own), batches, own)
