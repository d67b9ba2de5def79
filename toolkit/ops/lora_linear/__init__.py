"""A linear layer with low-rank adapters chosen row by row: many LoRA and DoRA adapters of any rank in one batch."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from toolkit.ops.linear import linear
from toolkit.ops.lora_linear import reference
from toolkit.ops.lora_linear.arguments import check
from toolkit.ops.registry import register

__all__ = ["lora_add", "lora_linear"]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base, x, a, b, scaling, adapters, groups, column_scales, bias = inputs
    scales_train = any(scale.requires_grad for scale in column_scales)
    ctx.save_for_backward(base if scales_train else None, x, *a, *b, adapters, groups, *column_scales, bias)
    ctx.scaling, ctx.count, ctx.scaled = list(scaling), len(a), len(column_scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    base, x, *rest = ctx.saved_tensors
    count, scaled = ctx.count, ctx.scaled
    a, b, (adapters, groups, *more) = rest[:count], rest[count : 2 * count], rest[2 * count :]
    column_scales, bias = more[:scaled], more[scaled]
    needs = ctx.needs_input_grad
    need_a, need_b, need_scales = (list(needs[at]) for at in (2, 3, 7))
    # Plain adapters pass the gradient on as it is.
    need_base, need_bias = bool(needs[0] and scaled), bool(needs[8])
    if not (need_base or needs[1] or need_bias or any(need_a) or any(need_b) or any(need_scales)):
        found: Sequence[Any] = (None, None, [None] * count, [None] * count, [None] * scaled, None)
    else:
        found = _BACKWARD.gradient(
            grad, base if any(need_scales) else None, x, a, b, ctx.scaling, adapters, groups, column_scales, bias,
            need_base, needs[1], need_a, need_b, need_scales, need_bias,
        )  # fmt: skip
    dbase, dx, da, db, dscales, dbias = found

    def given(gradients: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
        return [one if need else None for one, need in zip(gradients, needed)]

    return (
        dbase if need_base else grad if needs[0] else None,
        dx if needs[1] else None,
        given(da, need_a),
        given(db, need_b),
        None if count else [],  # of the numbers in scaling, a list without entries being one of tensors to autograd
        None,
        None,
        given(dscales, need_scales),
        dbias if need_bias else None,
    )


# The names say "rows" because native libraries that were built for an op of other arguments have the shorter ones.
_BACKWARD = register(
    "lora_add_rows_backward(Tensor grad, Tensor? base, Tensor x, Tensor[] a, Tensor[] b, float[] scaling,"
    " Tensor adapters, Tensor? groups, Tensor[] column_scales, Tensor? bias, bool need_base, bool need_x,"
    " bool[] need_a, bool[] need_b, bool[] need_scales, bool need_bias)"
    " -> (Tensor, Tensor, Tensor[], Tensor[], Tensor[], Tensor)",
    reference=reference.lora_add_backward,
    fake=reference.lora_add_backward_fake,
    triton="toolkit.ops.lora_linear.triton_backward.lora_add_backward",
)
_FORWARD = register(
    "lora_add_rows(Tensor base, Tensor x, Tensor[] a, Tensor[] b, float[] scaling, Tensor adapters, Tensor? groups,"
    " Tensor[] column_scales, Tensor? bias) -> Tensor",
    reference=reference.lora_add,
    fake=reference.lora_add_fake,
    triton="toolkit.ops.lora_linear.triton.lora_add",
    backward=_backward,
    setup_context=_setup_context,
)


def lora_add(
    base: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Sequence[float],
    adapters: Tensor,
    *,
    groups: Tensor | None = None,
    column_scales: Sequence[Tensor | None] | None = None,
    bias: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """``base[t] + s_l (x[t] A_l^T) B_l^T`` with ``l = adapters[t]``; ``base[t]`` where l is negative.

    DoRA, where adapter l has a column scale c_l: ``c_l (base[t] - bias + s_l (x[t] A_l^T) B_l^T) + bias``.

    Args:
        base: [..., N], the layer's output; float32, float64, bfloat16 or float16, as every tensor but the two of ids.
        x: [..., K].
        a: L tensors, each [R_l, K], or [G_l, R_l, K] for G_l slices (experts of an MoE layer). Ranks may differ,
            strides are free. Adapters are read where they lie: nothing is stacked or padded.
        b: L tensors, each [N, R_l] or [G_l, N, R_l].
        scaling: L numbers, constants.
        adapters: [...] int64, 0 to L - 1, the adapter of each row; negative: none.
        groups: [...] int64, the slice of its adapter for each row; None: slice 0. That of a row without adapter is not
            read.
        column_scales: for each adapter [N], DoRA's magnitude over the norm of the adapted weight, or None for plain
            LoRA. None: all are plain.
        bias: [N] or None: the layer's, which DoRA takes out before it scales. Not read without column_scales.
        impl: None (by device), "reference", "cpu" or "triton".

    Returns:
        [..., N] in base's dtype.

    Raises:
        ToolkitError: for shapes and dtypes that do not fit.
        IndexError: on CPU for an adapter >= L or a slice outside 0 to G_l - 1; on CUDA, where nothing is read back, the
            rows are NaN.

    Numerics: everything from x on is float32 (float64 for float64), rounded once at the end. The bits of a row depend
    on it and its adapter alone, not on the adapters, ranks and rows beside it. A row without adapter has base's bits.
    Gradients go to base, x, every a, b, column scale, and bias. Those of an adapter sum its rows (a slice's rows) in
    their order in blocks of a fixed number of rows, so they are deterministic and no other adapter changes them. An
    adapter without rows has zero gradients.
    Saved for backward: the inputs, base only where a column scale needs a gradient; the low-rank GEMMs are recomputed.
    Source: Hu et al., "LoRA" (2021); Liu et al., "DoRA" (2024).
    """
    check(base, x, a, b, scaling, adapters, groups, column_scales, bias)
    rows = adapters.numel()
    scales: list[Tensor] = []
    if column_scales is not None and any(scale is not None for scale in column_scales):
        none = base.new_empty(0)
        scales = [none if scale is None else scale for scale in column_scales]
    y = _FORWARD.select(impl)(
        base.reshape(rows, base.shape[-1]),
        x.reshape(rows, x.shape[-1]),
        list(a),
        list(b),
        [float(factor) for factor in scaling],
        adapters.reshape(-1),
        None if groups is None else groups.reshape(-1),
        scales,
        bias if scales else None,
    )
    return y.view(base.shape)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Sequence[float],
    adapters: Tensor,
    *,
    groups: Tensor | None = None,
    column_scales: Sequence[Tensor | None] | None = None,
    fast: bool = False,
    impl: str | None = None,
) -> Tensor:
    """``lora_add`` to ``x W^T + bias``: LoRA's ``x[t] W^T + bias + s_l (x[t] A_l^T) B_l^T``, or DoRA's.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.
        a, b, scaling, adapters, groups, column_scales: as for ``lora_add``.
        fast: the base GEMM is cuBLAS / MKL's, as in numerics mode "fast".
        impl: None (by device), "reference", "cpu" or "triton".

    Returns:
        [..., N] in x's dtype.

    Raises:
        ToolkitError, IndexError: as ``lora_add``.

    Numerics: ``linear`` (with ``fast`` cuBLAS / MKL) followed by ``lora_add``, which reads that sum once. With the base
    GEMM as a separate op a row without adapter is bitwise identical to ``linear``; the cost is one more rounding of the
    sum in 16-bit dtypes.
    """
    if fast and impl is None:
        base = F.linear(x, weight, bias)
    else:
        base = linear(x, weight, bias, impl=impl)
    return lora_add(
        base, x, a, b, scaling, adapters, groups=groups, column_scales=column_scales, bias=bias, impl=impl
    )  # fmt: skip
