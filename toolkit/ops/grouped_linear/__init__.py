"""Rows times the weights of their experts, and the ordered sum over a token's rows: a mixture of experts' two ends."""

from typing import Any

from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.grouped_linear import reference
from toolkit.ops.registry import register

__all__ = ["combine", "grouped_linear"]

Plan = tuple[Tensor, Tensor, Tensor, Tensor]
"""order, rows, offsets and tiles, of ``toolkit.ops.dispatch_plan``."""


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *plan, ctx.gather, ctx.transposed = inputs
    ctx.save_for_backward(x, weight, *plan)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *plan = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    found = _BACKWARD(grad, x, weight, *plan, ctx.gather, ctx.transposed, *needs)
    return *(one if need else None for one, need in zip(found, needs)), *[None] * 6


def _setup_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_of_combine(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, rows, weights = ctx.saved_tensors
    need_y, _, need_weights = ctx.needs_input_grad
    to_y, to_weights = _COMBINE_BACKWARD(grad, y, rows, weights, need_y, need_weights)
    return to_y if need_y else None, None, to_weights if need_weights else None


_BACKWARD = register(
    "grouped_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor order, Tensor rows, Tensor offsets,"
    " Tensor tiles, bool gather, bool transposed, bool need_x, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.grouped_linear_backward,
    fake=reference.grouped_linear_backward_fake,
    triton="toolkit.ops.grouped_linear.triton_backward.grouped_linear_backward",
)
_FORWARD = register(
    "grouped_linear(Tensor x, Tensor weight, Tensor? bias, Tensor order, Tensor rows, Tensor offsets, Tensor tiles,"
    " bool gather, bool transposed) -> Tensor",
    reference=reference.grouped_linear,
    fake=reference.grouped_linear_fake,
    triton="toolkit.ops.grouped_linear.triton.grouped_linear",
    backward=_backward,
    setup_context=_setup_context,
)
_COMBINE_BACKWARD = register(
    "combine_backward(Tensor grad, Tensor y, Tensor rows, Tensor? weights, bool need_y, bool need_weights)"
    " -> (Tensor, Tensor)",
    reference=reference.combine_backward,
    fake=reference.combine_backward_fake,
    triton="toolkit.ops.grouped_linear.triton_combine.combine_backward",
)
_COMBINE = register(
    "combine(Tensor y, Tensor rows, Tensor? weights) -> Tensor",
    reference=reference.combine,
    fake=reference.combine_fake,
    triton="toolkit.ops.grouped_linear.triton_combine.combine",
    backward=_backward_of_combine,
    setup_context=_setup_combine,
)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan,
    *,
    gather: bool = False,
    transposed: bool = False,
    impl: str | None = None,
) -> Tensor:
    """``y[r, n] = sum_k x[r, k] weight[e(r), n, k] + bias[e(r), n]``, e(r) the expert of row r by the plan.

    plan: of ``toolkit.ops.dispatch_plan`` for T tokens of K slots; R = T K rows.
    x: [R, D] in the order of the plan's rows, or with ``gather`` [T, D]: row r reads its token's, order[r] // K.
    weight: [E, N, D], or [E, D, N] where ``transposed``; bias: [E, N] or None. One dtype: float32, float64, bfloat16
    or float16 (the last two are added in float32 and rounded once).
    Returns [R, N] in x's dtype; rows from offsets[E] on are zeros.

    Numerics: a row's bits depend on that row and its expert's weights alone. On CPU they are those of ``linear``; where
    ``transposed``, one chain over blocks of ascending k likewise. Gradients of a weight add an expert's rows in
    ascending order (on CPU in blocks of like size) and those of x a token's in the order of its slots: the same bits
    every run. No atomics, no host sync on CUDA.
    Saved for backward: x, weight and plan.
    Raises ToolkitError where shapes or dtypes do not fit.
    """
    _check(x, weight, bias, plan, gather, transposed)
    return _FORWARD.select(impl)(x, weight, bias, *plan, gather, transposed)


def combine(y: Tensor, rows: Tensor, weights: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """``out[t] = sum_k weights[t, k] y[rows[t, k]]``: every token takes its own rows, in the order of its slots.

    y: [R, N]; rows: [T, K] int64 of a plan, -1 for a slot that adds nothing, no row twice; weights: [T, K] or None
    for ones. Returns [T, N] in y's dtype, added in float32 (float64 for float64) and rounded once.
    A token's bits depend on its own rows alone. Saved for backward: y, rows, weights.
    """
    if y.dim() != 2 or rows.dim() != 2 or (weights is not None and weights.shape != rows.shape):
        given = None if weights is None else list(weights.shape)
        raise ToolkitError(
            f"combine got y {list(y.shape)}, rows {list(rows.shape)} and weights {given}; allowed are [R, N], [T, K] "
            "and [T, K] or None."
        )
    return _COMBINE.select(impl)(y, rows, weights)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, gather: bool, transposed: bool) -> None:
    """ToolkitError, in one sentence, for arguments that do not fit."""
    _, rows, offsets, _ = plan
    depth, outputs = (1, 2) if transposed else (2, 1)
    wanted = rows.shape[0] if gather else rows.numel()
    count = len(offsets) - 1
    if weight.dim() != 3 or weight.shape[0] != count:
        raise ToolkitError(f"weight has shape {list(weight.shape)}; a plan of {count} experts needs [{count}, ., .].")
    if x.dim() != 2 or x.shape != (wanted, weight.shape[depth]):
        raise ToolkitError(
            f"x has shape {list(x.shape)}; the plan and weight {list(weight.shape)} need "
            f"[{wanted}, {weight.shape[depth]}]."
        )
    if bias is not None and bias.shape != (weight.shape[0], weight.shape[outputs]):
        raise ToolkitError(
            f"bias has shape {list(bias.shape)}; weight {list(weight.shape)} needs "
            f"[{weight.shape[0]}, {weight.shape[outputs]}]."
        )
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ToolkitError(f"grouped_linear got x of {x.dtype} and weight of {weight.dtype}; they must be equal.")
