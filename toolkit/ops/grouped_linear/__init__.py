"""Grouped GEMMs of an MoE layer, rows times their experts' weights, and the combine over a token's rows."""

from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.dispatch_plan import DispatchPlan
from toolkit.ops.grouped_linear import reference
from toolkit.ops.registry import Op, register_differentiable

__all__ = ["combine", "grouped_linear"]


_OP: Op[Tensor]
_OP, _ = register_differentiable(
    "grouped_linear(Tensor x, Tensor weight, Tensor? bias, Tensor order, Tensor rows, Tensor offsets, Tensor tiles,"
    " bool gather, bool transposed) -> Tensor",
    "grouped_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor order, Tensor rows, Tensor offsets,"
    " Tensor tiles, bool gather, bool transposed, bool need_x, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)",
    gradients=("x", "weight", "bias"),
    reference=reference,
    triton="toolkit.ops.grouped_linear.triton",
    triton_backward="toolkit.ops.grouped_linear.triton_backward",
)
_COMBINE: Op[Tensor]
_COMBINE, _ = register_differentiable(
    "combine(Tensor y, Tensor rows, Tensor? topk_weights) -> Tensor",
    "combine_backward(Tensor grad, Tensor y, Tensor rows, Tensor? topk_weights, bool need_y, bool need_topk_weights)"
    " -> (Tensor, Tensor)",
    gradients=("y", "topk_weights"),
    reference=reference,
    triton="toolkit.ops.grouped_linear.triton_combine",
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
    return _OP.select(impl)(x, weight, bias, *plan, gather, transposed)


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
