"""Low-rank adapters chosen row by row, in plain torch: the specification.

Shapes: T rows, K input and N output features, L adapters, R_l the rank of adapter l, G_l its slices.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.ops.linear.reference import linear as linear_reference
from toolkit.ops.rowwise import upcast


@dataclass(frozen=True)
class _Chosen:
    """The rows that take one slice of one adapter."""

    adapter: int
    rows: Tensor
    slice: int
    sliced: bool

    def of(self, weights: Sequence[Tensor]) -> Tensor:
        """The slice's matrix, in the dtype of the arithmetic."""
        whole = weights[self.adapter]
        return upcast(whole[self.slice] if self.sliced else whole)


def _check_range(name: str, ids: Tensor, count: int, allowed: str) -> None:
    if ids.device.type == "cpu" and ids.numel():
        wrong = int(ids.max()) if int(ids.max()) >= count else int(ids.min())
        if not 0 <= wrong < count:
            raise IndexError(f"{name} must be {allowed}, got {wrong}.")


def _chosen(adapters: Tensor, groups: Tensor | None, a: Sequence[Tensor]) -> Iterator[_Chosen]:
    """Each slice of an adapter that has rows, ascending, with its rows in their order."""
    allowed = f"negative or 0 to {len(a) - 1}" if len(a) else "negative where there are no adapters"
    _check_range("adapters", adapters.clamp_min(0) if len(a) else adapters[adapters >= 0], len(a), allowed)
    for adapter in adapters.unique().tolist():
        if not 0 <= adapter < len(a):
            continue
        rows = (adapters == adapter).nonzero().squeeze(-1)
        sliced = a[adapter].dim() == 3
        if groups is None:
            yield _Chosen(adapter, rows, 0, sliced)
            continue
        slices, own = a[adapter].shape[0] if sliced else 1, groups[rows]
        _check_range("groups", own, slices, f"0 to {slices - 1} for adapter {adapter}")
        for index in own.unique().tolist():
            if 0 <= index < slices:
                yield _Chosen(adapter, rows[own == index], index, sliced)


def _scale_of(column_scales: Sequence[Tensor], adapter: int) -> Tensor | None:
    """The column scale of an adapter; None for plain LoRA, whose entry is empty or missing."""
    return upcast(column_scales[adapter]) if column_scales and column_scales[adapter].numel() else None


def lora_add(
    base: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scaling: Sequence[float], adapters: Tensor,
    groups: Tensor | None, column_scales: Sequence[Tensor], bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """base [T, N] with the adapter of each row added: x [T, K], a_l and b_l as ``lora_add`` has them, adapters [T].

    In float32 (float64 for float64) from x on, rounded once. Rows of a negative adapter are base's. Differentiable.

    Args:
        column_scales: of each adapter, empty for plain LoRA; no entries at all where every adapter is.
    """
    y = upcast(base)
    for one in _chosen(adapters, groups, a):
        low = linear_reference(upcast(x[one.rows]), one.of(a)) * scaling[one.adapter]
        delta = linear_reference(low, one.of(b))
        scale = _scale_of(column_scales, one.adapter)
        if scale is None:
            changed = y[one.rows] + delta
        elif bias is None:
            changed = scale * (y[one.rows] + delta)
        else:
            changed = scale * (y[one.rows] - upcast(bias) + delta) + upcast(bias)
        y = y.index_copy(0, one.rows, changed)
    return y.to(base.dtype, copy=True)


def lora_add_backward(
    grad: Tensor, base: Tensor | None, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scaling: Sequence[float],
    adapters: Tensor, groups: Tensor | None, column_scales: Sequence[Tensor], bias: Tensor | None, need_base: bool,
    need_x: bool, need_a: Sequence[bool], need_b: Sequence[bool], need_scales: Sequence[bool], need_bias: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """Gradients to base, x, a, b, column_scales and bias; an empty tensor for one that is not needed.

    With ``v = c_l g`` (``g`` for plain LoRA), ``u = s_l v B_l`` and ``h = s_l x A_l^T``: ``dbase = v``, ``dx = u A_l``,
    ``dA_l = u^T x``, ``dB_l = v^T h``, ``dc_l = sum g (base - bias + h B_l^T)``, ``dbias = sum (1 - c_l) g``, sums over
    the rows of adapter l.

    Args:
        base: None where no gradient of column_scales is needed.
        need_scales: one of each column scale.
    """
    none = x.new_empty(0)
    dbase = grad.clone() if need_base else none
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else none.clone()
    da, db, dscales = (
        [torch.zeros(one.shape, dtype=upcast(none).dtype, device=x.device) if needed else none.clone()
         for one, needed in zip(of, needs, strict=True)]
        for of, needs in ((a, need_a), (b, need_b), (column_scales, need_scales))
    )  # fmt: skip
    dbias = torch.zeros(grad.shape[-1], dtype=upcast(none).dtype, device=x.device) if need_bias else none.clone()
    for one in _chosen(adapters, groups, a):
        index, scale = one.adapter, _scale_of(column_scales, one.adapter)
        given, values, first, second = upcast(grad[one.rows]), upcast(x[one.rows]), one.of(a), one.of(b)
        g = given if scale is None else given * scale
        up, low = scaling[index] * (g @ second), scaling[index] * (values @ first.T)
        if need_base and scale is not None:
            dbase[one.rows] = g.to(dbase.dtype)
        if need_x:
            dx[one.rows] = (up @ first).to(dx.dtype)
        if need_a[index]:
            (da[index][one.slice] if one.sliced else da[index]).copy_(up.T @ values)
        if need_b[index]:
            (db[index][one.slice] if one.sliced else db[index]).copy_(g.T @ low)
        if scale is None:
            continue
        if need_scales[index] and base is not None:
            under = upcast(base[one.rows]) if bias is None else upcast(base[one.rows]) - upcast(bias)
            dscales[index] += (given * (under + low @ second.T)).sum(0)
        if need_bias:
            dbias += (given * (1 - scale)).sum(0)
    narrow = [[one.to(x.dtype) for one in of] for of in (da, db, dscales)]
    return dbase, dx, narrow[0], narrow[1], narrow[2], dbias.to(x.dtype)


def lora_add_fake(
    base: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scaling: Sequence[float], adapters: Tensor,
    groups: Tensor | None, column_scales: Sequence[Tensor], bias: Tensor | None,
) -> Tensor:  # fmt: skip
    return torch.empty(base.shape, dtype=base.dtype, device=base.device)


def lora_add_backward_fake(
    grad: Tensor, base: Tensor | None, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scaling: Sequence[float],
    adapters: Tensor, groups: Tensor | None, column_scales: Sequence[Tensor], bias: Tensor | None, need_base: bool,
    need_x: bool, need_a: Sequence[bool], need_b: Sequence[bool], need_scales: Sequence[bool], need_bias: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    def like(t: Tensor, needed: bool) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed else x.new_empty(0)

    da, db, dscales = (
        [like(one, needed) for one, needed in zip(of, needs, strict=True)]
        for of, needs in ((a, need_a), (b, need_b), (column_scales, need_scales))
    )
    dbias = x.new_empty(grad.shape[-1]) if need_bias else x.new_empty(0)
    return like(grad, need_base), like(x, need_x), da, db, dscales, dbias
