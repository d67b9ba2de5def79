"""Low-rank adapters of linear layers, as PEFT keeps them (LoRA, DoRA): found, proven against PEFT's forward, and fused.

PEFT wraps a linear layer and adds ``scaling B A dropout(x)`` in four operations. Here the wrapper's forward is the
wrapped layer and one ``lora_add``. What a wrapper does besides is PEFT's own to do: its forward is then left in charge.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.modules.linear import linear_forward
from toolkit.numerics import Numerics
from toolkit.ops.lora_linear import lora_add
from toolkit.patching.claim import ProbeError, Undo, replace_forward
from toolkit.patching.probe import compare, random_input, signature_key, twin, with_forward

PARTS = ("lora_A", "lora_B", "lora_dropout", "scaling", "active_adapters", "disable_adapters", "merged")

_UNDO: "weakref.WeakKeyDictionary[nn.Module, Undo]" = weakref.WeakKeyDictionary()
_LEFT: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()


def is_adapter(module: nn.Module) -> bool:
    """Whether the module is a layer of PEFT's around another one."""
    return hasattr(module, "adapter_layer_names") and isinstance(getattr(module, "base_layer", None), nn.Module)


def wraps_parameter(module: nn.Module) -> bool:
    """Whether the module is a wrapper of one parameter of what is inside of it."""
    return all(hasattr(module, name) for name in ("parameter_name", "base_layer", "get_delta_factors"))


def inner_model(model: nn.Module) -> nn.Module:
    """The causal language model inside of a ``PeftModel``; any other model itself.

    Raises ToolkitError where the wrapper adds something of its own to the model's inputs (prompt learning).
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    for name, config in model.peft_config.items():  # type: ignore[union-attr, operator]
        if config.is_prompt_learning:
            raise ToolkitError(
                f"peft_type of adapter {name!r} is {config.peft_type.value}; allowed are adapters of layers."
            )
    return model.get_base_model()  # type: ignore[operator]


@contextmanager
def adapters_aside(model: nn.Module) -> Iterator[None]:
    """The model as it is without adapters around its layers: roles are recognised by the layers themselves.

    Replaced forwards call projections by name, as modules, so the adapters act again once they are back.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and is_adapter(child) and not wraps_parameter(child)
    ]
    try:
        for parent, name, child in places:
            parent._modules[name] = child.base_layer  # type: ignore[assignment]
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def adapter_layers(model: nn.Module) -> list[Any]:
    """All wrappers of PEFT's in the model."""
    return [module for module in model.modules() if is_adapter(module)]


def adapter_state(layers: list[Any]) -> int:
    """A number of what the wrappers do besides their parameters: which adapters act, how strongly, merged or not."""
    return hash(
        tuple(
            (
                tuple(layer.active_adapters),
                bool(layer.disable_adapters),
                tuple(layer.merged_adapters),
                tuple(sorted(getattr(layer, "scaling", {}).items())),
            )
            for layer in layers
        )
    )


def fuse_adapters(model: nn.Module, numerics: Numerics) -> None:
    """Let the wrappers of linear layers in ``model`` that are proven to be LoRA or DoRA run fused.

    In the bitwise tier the factors of all of them are multiplied row by row, for where PEFT's own forward does it.
    """
    proven: dict[Any, str | Callable[..., Any]] = {}
    for module in adapter_layers(model):
        if wraps_parameter(module):
            continue
        if numerics is Numerics.BITWISE:
            _keep_bits(module)
        if module in _LEFT or "forward" in module.__dict__:
            continue
        key = signature_key(module)
        if key not in proven:
            proven[key] = _proven_forward(module)
        verdict = proven[key]
        if isinstance(verdict, str):
            _LEFT[module] = verdict
        else:
            _UNDO[module] = replace_forward(module, verdict)()


def release_linear_adapters(model: nn.Module) -> None:
    """Give the wrappers, and their factors, their own forward back."""
    for module in model.modules():
        undo = _UNDO.pop(module, None)
        if undo is not None:
            undo()
        _LEFT.pop(module, None)


FUSED = "fused"


def adapter_report(model: nn.Module) -> list[tuple[str, str]]:
    """(path, ``FUSED`` or why PEFT's own forward was kept) of each wrapper of a linear layer of an adopted model."""
    return [
        (path, FUSED if module in _UNDO else _LEFT.get(module, "another forward was put in its place"))
        for path, module in model.named_modules()
        if is_adapter(module) and not wraps_parameter(module)
    ]


def _keep_bits(module: Any) -> None:
    """The factors' own products, in one order of additions for any number of rows."""
    for name in ("lora_A", "lora_B"):
        for factor in getattr(module, name, {}).values():
            if type(factor) is nn.Linear and "forward" not in factor.__dict__:
                _UNDO[factor] = replace_forward(factor, linear_forward)()


def _proven_forward(module: Any) -> Callable[..., Any] | str:
    """The fused forward, or why there is none."""
    from toolkit.patching.roles.search import prove  # roles import this file

    missing = [name for name in PARTS if not hasattr(module, name)]
    if missing:
        return f"it has no {missing[0]}"
    if type(module.base_layer) is not nn.Linear:
        return f"it wraps a {type(module.base_layer).__name__}, not nn.Linear"
    own = type(module).forward
    found = prove([("lora_linear", fused_forward(own), partial(_probe, module, own))])
    return found if isinstance(found, str) else found[1]


def _probe(module: nn.Module, own: Callable[..., Any]) -> ProbeError:
    copied: Any = twin(module)
    acting = [name for name in copied.active_adapters if name in copied.lora_A]
    for name in acting:
        if not _is_fused(copied, name, len(acting)):
            raise NotImplementedError(f"adapter {name!r} is neither plain LoRA nor DoRA alone")
    x = random_input(2, 3, copied.base_layer.in_features, like=copied)
    return compare(
        with_forward(copied, fused_forward(own)), with_forward(copied, own), [[x]], list(copied.parameters())
    )


def fused_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """Forward of a wrapper: x [..., K] to ``base(x) + sum over active adapters of scaling B A dropout(x)``.

    DoRA (Liu et al., 2024): ``m (base(x) - bias + scaling B A x) / |W + scaling B A| + bias``, the norm of each row of
    weights taken without gradient. ``own``, the wrapper's own forward, does what is neither: several adapters one of
    which is not plain, adapters by sample, merged or disabled ones, autocast, factors narrower than the layer's output.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self.merged or self.disable_adapters or torch.is_autocast_enabled(x.device.type):
            return own(self, x, *args, **kwargs)
        acting = [name for name in self.active_adapters if name in self.lora_A]
        if not all(_is_fused(self, name, len(acting)) and _fits(self, name, x) for name in acting):
            return own(self, x)
        result = self.base_layer(x)
        for name in acting:
            result = _add(self, name, x, result)
        return result

    return forward


def _is_fused(module: Any, name: str, acting: int) -> bool:
    """Whether the adapter is of a form that ``_add`` computes."""
    if any(type(part) is not nn.Linear or part.bias is not None for part in (module.lora_A[name], module.lora_B[name])):
        return False
    if name not in getattr(module, "lora_variant", {}):
        return True
    dropped = module.training and not isinstance(module.lora_dropout[name], nn.Identity)
    return name in getattr(module, "lora_magnitude_vector", {}) and acting == 1 and not dropped


def _fits(module: Any, name: str, x: Tensor) -> bool:
    """Whether the factors can be read where they lie, and in a dtype as wide as x and the layer's output."""
    weight = module.lora_A[name].weight
    wide = torch.promote_types(torch.promote_types(x.dtype, module.base_layer.weight.dtype), weight.dtype)
    return wide == weight.dtype and not hasattr(weight, "ds_id")  # ZeRO-3 gathers parameters for their own module only


def _add(module: Any, name: str, x: Tensor, base: Tensor) -> Tensor:
    a, b, scaling = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    wide, dropped = base.to(a.dtype), module.lora_dropout[name](x.to(a.dtype))
    rows = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    factor = torch.full((1,), float(scaling), dtype=a.dtype, device=x.device)
    if name not in getattr(module, "lora_variant", {}):
        return lora_add(wide, dropped, a[None], b[None], factor, rows).to(base.dtype)
    bias, weight = module.base_layer.bias, module.base_layer.weight
    magnitude = module.lora_magnitude_vector[name].weight
    with torch.no_grad():
        norm = torch.linalg.norm(weight + scaling * (b @ a).to(weight.dtype), dim=1).to(magnitude.dtype)
    plain = wide if bias is None else wide - bias
    turned = lora_add(plain, dropped, a[None], b[None], factor, rows) * (magnitude / norm)
    return (turned if bias is None else turned + bias).to(base.dtype)
