"""Fused forwards of adapted linear layers: LoRA and DoRA.

PEFT adds ``scaling B A dropout(x)`` to the layer's output in four operations; here it is one ``lora_add``.

Shapes: K input and N output features, r rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.ops.lora_linear import lora_add


def fused_linear(own: Callable[..., Any]) -> Callable[..., Any]:
    """Forward of a wrapper: x [..., K] to ``base(x) + sum over active adapters of scaling B A dropout(x)`` [..., N].

    DoRA (Liu et al., 2024): ``m (base(x) - bias + scaling B A x) / |W + scaling B A| + bias``; the norm of each row of
    weights is taken without gradient.

    Args:
        own: the wrapper's own forward. It computes what is neither: several adapters one of which is not plain LoRA,
            adapters per sample, merged or disabled adapters, autocast, factors of a narrower dtype than the output.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self.merged or self.disable_adapters or torch.is_autocast_enabled(x.device.type):
            return own(self, x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not all(is_fusible(self, name, len(active)) and _factors_fit(self, name, x) for name in active):
            return own(self, x)
        result = self.base_layer(x)
        for name in active:
            result = _add(self, name, x, result)
        return result

    return forward


def is_fusible(module: Any, name: str, active: int) -> bool:
    """Whether ``fused_linear`` computes adapter ``name`` of a wrapper that has ``active`` active adapters."""
    if any(type(part) is not nn.Linear or part.bias is not None for part in (module.lora_A[name], module.lora_B[name])):
        return False
    if name not in getattr(module, "lora_variant", {}):
        return True
    dropped = module.training and not isinstance(module.lora_dropout[name], nn.Identity)
    return name in getattr(module, "lora_magnitude_vector", {}) and active == 1 and not dropped


def _factors_fit(module: Any, name: str, x: Tensor) -> bool:
    """Whether the factors can be read in place, and in a dtype at least as wide as x and the layer's output."""
    weight = module.lora_A[name].weight
    dtype = torch.promote_types(torch.promote_types(x.dtype, module.base_layer.weight.dtype), weight.dtype)
    return dtype == weight.dtype and not hasattr(weight, "ds_id")  # ZeRO-3 gathers parameters for their own module only


def _add(module: Any, name: str, x: Tensor, base: Tensor) -> Tensor:
    """``base`` [..., N], the layer's output, with one adapter added, in its dtype."""
    a_rK, b_Nr, scaling = module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name])
    dtype = a_rK.dtype
    adapter_of_row = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    scale = bias = None
    if name in getattr(module, "lora_variant", {}):
        magnitude, layer = module.lora_magnitude_vector[name].weight, module.base_layer
        scale = column_scale(magnitude, layer.weight, a_rK, b_Nr, scaling).to(dtype)
        bias = None if layer.bias is None else layer.bias.to(dtype)
    dropped = module.lora_dropout[name](x.to(dtype))
    result = lora_add(
        base.to(dtype), dropped, [a_rK], [b_Nr], [scaling], adapter_of_row, column_scales=[scale], bias=bias
    )  # fmt: skip
    return result.to(base.dtype)


def column_scale(magnitude_N: Tensor, weight_NK: Tensor, a_rK: Tensor, b_Nr: Tensor, scaling: float) -> Tensor:
    """DoRA's magnitude over the norm of each row of the adapted weight [N]; the norm is taken without gradient."""
    with torch.no_grad():
        norm_N = torch.linalg.norm(weight_NK + scaling * (b_Nr @ a_rK).to(weight_NK.dtype), dim=1)
    return magnitude_N / norm_N.to(magnitude_N.dtype)
