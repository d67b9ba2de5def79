"""Install the fused forwards on a model's wrappers, say what was fused and what was skipped, and take them back."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from toolkit.modules.linear import linear_forward
from toolkit.modules.moe_experts import moe_experts_of
from toolkit.numerics import Numerics
from toolkit.patching.adapters.embeddings import adapts_embedding, proven_embedding
from toolkit.patching.adapters.experts import grouped_experts
from toolkit.patching.adapters.find import adapter_layers, base_module, is_adapter, wraps_parameter
from toolkit.patching.adapters.prove import proven_forward
from toolkit.patching.adapters.tokens import proven_tokens, trains_tokens
from toolkit.patching.attached import attach, attached, detach
from toolkit.patching.claim import Undo, replace_forward
from toolkit.patching.probe import device_of, signature_key

FUSED = "fused"

_UNDO = "_toolkit_undo"
_SKIPPED: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()


def fuse_adapters(model: nn.Module, numerics: Numerics | None = None) -> int:
    """Number of adapted parameters of experts, after the adapters of a patched ``model`` were fused.

    Linear layers that are proven to be LoRA or DoRA, and embeddings with LoRA, become the layer and one ``lora_add``;
    LoRA on parameters of experts becomes grouped GEMMs; of an embedding or a head some of whose rows are trained no
    copy is made. ``patch``
    calls this, the engine calls it whenever a prompt enters, and ``toolkit train`` after adding adapters. Adapters that
    are not fused run PEFT's own forward: correct, and slower.

    Args:
        numerics: mode of the patch; None is the default of the model's device. In bitwise mode the factors' GEMMs are
            batch-invariant too, for the forwards that stay PEFT's.
    """
    _fuse_linear(model, numerics or Numerics.choose(None, device_of(model)))
    count = 0
    for module in model.modules():
        if wraps_parameter(module) and moe_experts_of(base_module(module)) is not None:
            count += 1
            if "forward" not in module.__dict__:
                replace_forward(module, grouped_experts(type(module).forward))()
    return count


def _fuse_linear(model: nn.Module, numerics: Numerics) -> None:
    proven: dict[Any, str | Callable[..., Any]] = {}
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    for module in adapter_layers(model):
        if wraps_parameter(module):
            continue
        if numerics is Numerics.BITWISE:
            _make_factors_batch_invariant(module)
        if module in _SKIPPED or "forward" in module.__dict__:
            continue
        key = signature_key(module), module is head
        if key not in proven:
            if trains_tokens(module):
                proven[key] = proven_tokens(module, numerics is Numerics.BITWISE)
            else:
                proven[key] = (
                    proven_embedding(module) if adapts_embedding(module) else proven_forward(module, module is head)
                )
        verdict = proven[key]
        if isinstance(verdict, str):
            _SKIPPED[module] = verdict
        else:
            attach(module, _UNDO, replace_forward(module, verdict)())


def _make_factors_batch_invariant(module: Any) -> None:
    for name in ("lora_A", "lora_B"):
        for factor in getattr(module, name, {}).values():
            if type(factor) is nn.Linear and "forward" not in factor.__dict__:
                attach(factor, _UNDO, replace_forward(factor, linear_forward)())


def is_fused(module: nn.Module) -> bool:
    """Whether the forward of a wrapper is a fused one."""
    return attached(module, _UNDO) is not None


def adapter_report(model: nn.Module) -> list[tuple[str, str]]:
    """(path, ``FUSED`` or the reason why PEFT's forward stays) of each wrapper of a linear layer."""
    return [
        (path, FUSED if is_fused(module) else _SKIPPED.get(module, "another forward was put in its place"))
        for path, module in model.named_modules()
        if is_adapter(module) and not wraps_parameter(module)
    ]


def release_adapters(model: nn.Module) -> None:
    """Give all wrappers, and their factors, PEFT's own forward back."""
    for module in model.modules():
        undo: Undo | None = detach(module, _UNDO)
        if undo is not None:
            undo()
        _SKIPPED.pop(module, None)
        if wraps_parameter(module):
            module.__dict__.pop("forward", None)
