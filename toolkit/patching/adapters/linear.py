"""Fused forwards of adapted linear layers: LoRA and DoRA.

PEFT adds ``scaling B A dropout(x)`` to the layer's output in four operations; here it is one ``lora_add``, for the
adapters that are switched on and for those that rows of a batch choose.

Shapes: K input and N output features, r rank.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.modules.tensor_parallel import Split, split_of_forward
from toolkit.ops.collectives import copy_to_ranks, gather_from_ranks, split_to_ranks
from toolkit.ops.lora_linear import lora_add
from toolkit.patching.adapters.rows import RowAdapters, no_factors, row_adapters
from toolkit.state.paged import PagedContext

_SCALES: "weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]]" = weakref.WeakKeyDictionary()


def fused_linear(own: Callable[..., Any], head: bool = False) -> Callable[..., Any]:
    """Forward of a wrapper: x [..., K] to ``base(x) + sum over active adapters of scaling B A dropout(x)`` [..., N].

    DoRA (Liu et al., 2024): ``m (base(x) - bias + scaling B A x) / |W + scaling B A| + bias``; the norm of each row of
    weights is taken without gradient. Where rows of the batch choose adapters, each has its own in the place of those
    that are active.

    Args:
        own: the wrapper's own forward. It computes what is neither: several adapters one of which is not plain LoRA,
            adapters per sample, merged or disabled adapters, autocast, factors of a narrower dtype than the output.
        head: whether the layer is the model's head.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (rows := row_adapters(x.shape[:-1], head)) is not None:
            return _add_chosen(self, x, rows)
        if args or kwargs or self.merged or self.disable_adapters or torch.is_autocast_enabled(x.device.type):
            return own(self, x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.lora_A]
        fits = all(is_fusible(self, name, len(active)) and factors_fit(self, name, x.dtype) for name in active)
        if not fits:
            return own(self, x)
        result = self.base_layer(x)
        for name in active:
            scale = _scale(self, name) if is_dora(self, name) else None
            result = _add(self, [name], [scale], x, result, None)
        return result

    return forward


def is_fusible(module: Any, name: str, active: int, evaluates: bool = False) -> bool:
    """Whether ``fused_linear`` computes adapter ``name`` of a wrapper that has ``active`` active adapters.

    Args:
        evaluates: asks for eval mode: dropout in train mode is not fused with DoRA.
    """
    if any(type(part) is not nn.Linear or part.bias is not None for part in (module.lora_A[name], module.lora_B[name])):
        return False
    if name not in getattr(module, "lora_variant", {}):
        return True
    dropped = module.training and not evaluates and not isinstance(module.lora_dropout[name], nn.Identity)
    split = split_of_forward(module.base_layer) is not None  # a rank has no norms of all rows
    return is_dora(module, name) and active == 1 and not dropped and not split


def is_dora(module: Any, name: str) -> bool:
    """Whether an adapter scales the layer's output by a magnitude."""
    return name in getattr(module, "lora_variant", {}) and name in getattr(module, "lora_magnitude_vector", {})


def factors_fit(module: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether factors can be read in place, and have a dtype at least as wide as inputs of ``dtype`` and the output."""
    weight = module.lora_A[name].weight
    widest = torch.promote_types(torch.promote_types(dtype, module.base_layer.weight.dtype), weight.dtype)
    return widest == weight.dtype and not hasattr(weight, "ds_id")  # ZeRO-3 gathers them for their own module only


def refresh_scales(model: nn.Module) -> None:
    """Compute again what DoRA scales by in decode steps, after a write to the model's weights."""
    with torch.no_grad():
        for module in model.modules() if _SCALES else ():
            for name, kept in _SCALES.get(module, {}).items():
                if is_dora(module, name):  # else it has left, or is LoRA by now
                    kept.copy_(_scale(module, name))


def _add_chosen(module: Any, x: Tensor, rows: RowAdapters) -> Tensor:
    """The layer's output [..., N], to each row of which the adapter is added that it chooses."""
    result: Tensor = module.base_layer(x)  # with what is merged into it, which no row chooses
    names = [name for name in rows.names if name in module.lora_A]
    # Each dtype, and each dropout, is a separate call: a row has one adapter, so others leave it as it is.
    for _, group in groupby(names, lambda name: _kind(module, name)):
        chosen = list(group)
        scales = [_kept_scale(module, name, rows) if is_dora(module, name) else None for name in chosen]
        result = _add(module, chosen, scales, x, result, rows)
    return result


def _kind(module: Any, name: str) -> tuple[torch.dtype, str]:
    dropped = module.training and not isinstance(module.lora_dropout[name], nn.Identity)
    return module.lora_A[name].weight.dtype, name if dropped else ""


def _add(
    module: Any,
    names: Sequence[str],
    scales: Sequence[Tensor | None],
    x: Tensor,
    base: Tensor,
    rows: RowAdapters | None,
) -> Tensor:
    """``base`` [..., N], the layer's output, with adapters added, in its dtype: the one of all rows, or each row's."""
    dtype = module.lora_A[names[0]].weight.dtype
    split = split_of_forward(module.base_layer)
    if split is not None and split.input:
        x = gather_from_ranks(x, -1, module.base_layer.in_features, split.group)
    if split is not None and split.output:
        x = copy_to_ranks(x, split.group)
    dropped = module.lora_dropout[names[0]](x.to(dtype))
    if rows is None:
        every, ids = list(names), torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    else:
        every, ids = list(rows.names), rows.ids
    found = dict(zip(names, scales))
    empty = no_factors(x.shape[-1], base.shape[-1], dtype, x.device)
    factors = [
        (*_factors(module, name, split), float(module.scaling[name])) if name in found else (*empty, 0.0)
        for name in every
    ]
    a, b, scaling = zip(*factors)
    scaled, bias = any(scale is not None for scale in scales), module.base_layer.bias
    result = lora_add(
        base.to(dtype),
        dropped,
        a,
        b,
        scaling,
        ids,
        column_scales=[_cast(found.get(name), dtype) for name in every] if scaled else None,
        bias=_cast(bias, dtype) if scaled else None,
    )
    return result.to(base.dtype)


def _factors(module: Any, name: str, split: Split | None) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] of an adapter, which every rank holds whole; of B the rows of what the layer returns."""
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    if split is None or not split.output:
        return a, b
    return copy_to_ranks(a, split.group), split_to_ranks(b, 0, split.group)


def _cast(row: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if row is None else row.to(dtype)


def _kept_scale(module: Any, name: str, rows: RowAdapters) -> Tensor:
    """``_scale``; of the engine's forwards a tensor that ``refresh_scales`` keeps up to date."""
    if torch.is_grad_enabled() or not isinstance(rows.context, PagedContext):
        return _scale(module, name)
    kept = _SCALES.setdefault(module, {})
    if name not in kept:
        with torch.inference_mode(False), torch.no_grad():
            kept[name] = _scale(module, name).clone()
    return kept[name]


def _scale(module: Any, name: str) -> Tensor:
    """[N] DoRA's magnitude over the norm of each row of ``W + scaling B A``."""
    weight, a_rK, b_Nr = module.base_layer.weight, module.lora_A[name].weight, module.lora_B[name].weight
    magnitude: Tensor = module.lora_magnitude_vector[name].weight
    with torch.no_grad():
        norm = torch.linalg.norm(weight + module.scaling[name] * (b_Nr @ a_rK).to(weight.dtype), dim=1)
    scale: Tensor = magnitude / norm.to(magnitude.dtype)
    return scale
