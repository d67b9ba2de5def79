"""Grouped GEMMs of an MoE layer, rows times their experts' weights, and the combine over a token's rows."""

from typing import Any

from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.dispatch_plan import DispatchPlan
from toolkit.ops.grouped_linear import reference
from toolkit.ops.registry import register

__all__ = ["combine", "grouped_linear"]


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
    y, rows, topk_weights = ctx.saved_tensors
    need_y, _, need_weights = ctx.needs_input_grad
    to_y, to_weights = _COMBINE_BACKWARD(grad, y, rows, topk_weights, need_y, need_weights)
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
    "combine_backward(Tensor grad, Tensor y, Tensor rows, Tensor? topk_weights, bool need_y, bool need_weights)"
    " -> (Tensor, Tensor)",
    reference=reference.combine_backward,
    fake=reference.combine_backward_fake,
    triton="toolkit.ops.grouped_linear.triton_combine.combine_backward",
)
_COMBINE = register(
    "combine(Tensor y, Tensor rows, Tensor? topk_weights) -> Tensor",
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
    plan: DispatchPlan,
    *,
    gather: bool = False,
    transposed: bool = False,
    impl: str | None = None,
) -> Tensor:
    """[R, N]: ``y[r, n] = sum_k x[r, k] weight[e(r), n, k] + bias[e(r), n]``, e(r) the expert of row r by the plan.

    Args:
        x: [R, D] in row order of the plan, or with ``gather`` [T, D]: row r reads its token's, order[r] // K.
        weight: [E, N, D], or [E, D, N] where ``transposed``.
        bias: [E, N] or None. One dtype: float32, float64, bfloat16 or float16.
        plan: of ``toolkit.ops.dispatch_plan`` for T tokens with K experts each; R = T K rows.

    Returns:
        [R, N] in x's dtype; rows from offsets[E] on are zeros.

    Raises:
        ToolkitError: where shapes or dtypes do not fit.

    Numerics: batch-invariant: a row depends on that row and its expert's weights alone. bfloat16 and float16 accumulate
    in float32 and are rounded once. On CPU a row is bitwise identical to ``linear``; where ``transposed``, it is one
    chain over blocks of ascending k too. Gradients of a weight add an expert's rows in ascending order (on CPU in
    blocks of equal size) and those of x a token's rows in order of k: deterministic. No atomics, no host sync on CUDA.
    Saved for backward: x, weight and plan.
    """
    _check(x, weight, bias, plan, gather, transposed)
    return _FORWARD.select(impl)(x, weight, bias, *plan, gather, transposed)


def combine(y: Tensor, rows: Tensor, topk_weights: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """[T, N]: ``out[t] = sum_k topk_weights[t, k] y[rows[t, k]]``, every token's rows added in order of k.

    Args:
        y: [R, N].
        rows: [T, K] int64 of a plan, -1 for a pair that adds nothing, no row twice.
        topk_weights: [T, K], or None for ones.

    Returns:
        [T, N] in y's dtype.

    Raises:
        ToolkitError: where shapes do not fit.

    Numerics: batch-invariant; accumulated in float32 (float64 for float64) and rounded once.
    Saved for backward: y, rows, topk_weights.
    """
    if y.dim() != 2 or rows.dim() != 2 or (topk_weights is not None and topk_weights.shape != rows.shape):
        given = None if topk_weights is None else list(topk_weights.shape)
        raise ToolkitError(
            f"combine needs y [R, N], rows [T, K] and topk_weights [T, K] or None, got {list(y.shape)}, "
            f"{list(rows.shape)} and {given}."
        )
    return _COMBINE.select(impl)(y, rows, topk_weights)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, plan: DispatchPlan, gather: bool, transposed: bool) -> None:
    """ToolkitError for arguments that do not fit."""
    _, rows, offsets, _ = plan
    depth, outputs = (1, 2) if transposed else (2, 1)
    wanted = rows.shape[0] if gather else rows.numel()
    count = len(offsets) - 1
    if weight.dim() != 3 or weight.shape[0] != count:
        raise ToolkitError(f"weight must be [{count}, ., .] for a plan of {count} experts, got {list(weight.shape)}.")
    if x.dim() != 2 or x.shape != (wanted, weight.shape[depth]):
        raise ToolkitError(
            f"x must be [{wanted}, {weight.shape[depth]}] for the plan and weight {list(weight.shape)}, got "
            f"{list(x.shape)}."
        )
    if bias is not None and bias.shape != (weight.shape[0], weight.shape[outputs]):
        raise ToolkitError(
            f"bias must be [{weight.shape[0]}, {weight.shape[outputs]}] for weight {list(weight.shape)}, got "
            f"{list(bias.shape)}."
        )
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ToolkitError(f"grouped_linear needs one dtype for x, weight and bias, got {x.dtype} and {weight.dtype}.")
