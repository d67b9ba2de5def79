"""The experts of an MoE layer (Shazeer et al., 2017) as one op: two grouped GEMMs and what lies between them."""

from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.ops.activation.kinds import find
from toolkit.ops.dispatch_plan import DispatchPlan
from toolkit.ops.experts import reference
from toolkit.ops.grouped_linear import grouped_linear
from toolkit.ops.registry import Op, register_differentiable
from toolkit.ops.transforms import transformed

__all__ = ["SCORE_POSITIONS", "experts", "is_gated"]

SCORE_POSITIONS = reference.SCORE_POSITIONS
is_gated = reference.is_gated
_FLAGS = 4  # activation, score_position, transposed, interleaved


_FORWARD: Op[tuple[Tensor, Tensor]]
_BACKWARD: Op[tuple[Tensor, ...]]
_FORWARD, _BACKWARD = register_differentiable(
    "experts(Tensor x, Tensor topk_weights, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, Tensor order,"
    " Tensor rows, Tensor offsets, Tensor tiles, str activation, str score_position, bool transposed, bool interleaved)"
    " -> (Tensor out, Tensor z)",
    "experts_backward(Tensor grad, Tensor x, Tensor topk_weights, Tensor z, Tensor up, Tensor down, Tensor? down_bias,"
    " Tensor order, Tensor rows, Tensor offsets, Tensor tiles, str activation, str score_position, bool transposed,"
    " bool interleaved, bool need_x, bool need_topk_weights, bool need_up, bool need_up_bias, bool need_down,"
    " bool need_down_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    gradients=("x", "topk_weights", "up", "up_bias", "down", "down_bias"),
    reference=reference,
    triton="toolkit.ops.experts.triton",
    triton_backward="toolkit.ops.experts.triton_backward",
)


class _Recomputed(torch.autograd.Function):
    """``experts`` that saves no pre-activation: the backward recomputes the first GEMM."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.flags = arguments[-_FLAGS:]
        ctx.save_for_backward(*arguments[:-_FLAGS])
        return _FORWARD(*arguments)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, topk_weights, up, up_bias, down, down_bias, *tensors = ctx.saved_tensors
        plan = DispatchPlan(*tensors)
        _, score_position, transposed, _ = ctx.flags
        if score_position == "input":
            weight = reference.weight_of_rows(topk_weights, plan.order, plan.offsets)
            source = (x[plan.order // max(plan.rows.shape[1], 1)].to(weight.dtype) * weight).to(x.dtype)
            z = grouped_linear(source, up, up_bias, plan, transposed=transposed)
        else:
            z = grouped_linear(x, up, up_bias, plan, gather=True, transposed=transposed)
        needs = ctx.needs_input_grad[:6]
        found = _BACKWARD.gradient(grad, x, topk_weights, z, up, down, down_bias, *plan, *ctx.flags, *needs)
        return *(one if need else None for one, need in zip(found, needs)), *[None] * (4 + _FLAGS)


def experts(
    x: Tensor,
    topk_weights: Tensor,
    up: Tensor,
    down: Tensor,
    plan: DispatchPlan,
    activation: str,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    score_position: str = "activation",
    transposed: bool = False,
    interleaved: bool = False,
    recompute: bool = False,
    impl: str | None = None,
) -> Tensor:
    """[T, H]: ``out[t] = sum_k w W_down[e] act(W_up[e] x[t] + b_up[e]) + w b_down[e]``, e and w of the pair (t, k).

    Args:
        x: [T, H]. One dtype with weights and biases: float32, float64, bfloat16 or float16.
        topk_weights: [T, K], the routing weights w, in x's dtype or float32 (float64 for float64).
        up: [E, G I, H], or [E, H, G I] where ``transposed``. G is 2 with a gate, else 1.
        down: [E, H, I], or [E, I, H] where ``transposed``.
        plan: of ``toolkit.ops.dispatch_plan`` for T tokens with K of E experts; skipped pairs add nothing.
        activation: a kind of ``toolkit.ops.gated_activation`` with a gate, of ``toolkit.ops.activation`` without one.
        up_bias: [E, G I] or None.
        down_bias: [E, H] or None.
        score_position: where w is applied: at the "activation", which leaves an unweighted sum at the end (the same
            mathematics as at the "combine"), or at the "input", ``W_up[e] (w x)`` and nowhere else (Llama 4).
        transposed: layout of the weights, see above.
        interleaved: gate and up alternate along G I; otherwise the gate is the first half.
        recompute: save no pre-activation; the backward recomputes the first GEMM, bitwise identical. By device only,
            without ``impl``.

    Returns:
        [T, H] in x's dtype.

    Raises:
        ToolkitError: for an unknown activation or score_position, or shapes or dtypes that do not fit.

    Numerics: batch-invariant: a token depends on its own row, experts and weights alone, summed in order of k. GEMMs
    accumulate in float32 (float64 for float64); intermediates are stored in x's dtype. Gradients reach x, topk_weights,
    weights and biases; a weight's adds its expert's rows in ascending order. Deterministic, no atomics, no host sync on
    CUDA.
    Saved for backward: x, the pre-activation [R, G I], topk_weights and plan; no activation, no expert outputs.
    """
    _check(x, topk_weights, up, down, plan, activation, up_bias, down_bias, score_position, transposed)
    arguments = (
        x, topk_weights, up, up_bias, down, down_bias, *plan, activation, score_position, transposed, interleaved
    )  # fmt: skip
    if recompute and torch.is_grad_enabled() and not transformed():
        out: Tensor = _Recomputed.apply(*arguments)  # type: ignore[no-untyped-call]
        return out
    return _FORWARD.select(impl)(*arguments)[0]


def _check(
    x: Tensor,
    topk_weights: Tensor,
    up: Tensor,
    down: Tensor,
    plan: DispatchPlan,
    activation: str,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    score_position: str,
    transposed: bool,
) -> None:
    """ToolkitError for arguments that do not fit."""
    _, rows, offsets, _ = plan
    if score_position not in SCORE_POSITIONS:
        raise ToolkitError(must_be_one_of("score_position", score_position, SCORE_POSITIONS))
    count = len(offsets) - 1
    if up.dim() != 3 or down.dim() != 3 or x.dim() != 2:
        raise ToolkitError(
            f"experts needs x [T, H], up [E, G I, H] and down [E, H, I], got {list(x.shape)}, {list(up.shape)} and "
            f"{list(down.shape)}."
        )
    hidden = x.shape[1]
    outer, up_outputs = (up.shape[1], up.shape[2]) if transposed else (up.shape[2], up.shape[1])
    inner, back = (down.shape[1], down.shape[2]) if transposed else (down.shape[2], down.shape[1])
    gated = up_outputs != inner
    if (
        (outer, back) != (hidden, hidden)
        or up_outputs not in (inner, 2 * inner)
        or {up.shape[0], down.shape[0]} != {count}
    ):
        raise ToolkitError(
            f"experts needs x, up, down and a plan that fit together, got {list(x.shape)}, {list(up.shape)}, "
            f"{list(down.shape)} and a plan of {count} experts."
        )
    find(activation, plain=not gated)
    if rows.shape[0] != x.shape[0] or topk_weights.shape != rows.shape:
        raise ToolkitError(
            f"experts needs x [T, H], topk_weights [T, K] and a plan of pairs [T, K], got {list(x.shape)}, "
            f"{list(topk_weights.shape)} and {list(rows.shape)}."
        )
    for name, bias, size in (("up_bias", up_bias, up_outputs), ("down_bias", down_bias, hidden)):
        if bias is not None and (bias.shape != (count, size) or bias.dtype != x.dtype):
            given = f"{list(bias.shape)} of {bias.dtype}"
            raise ToolkitError(f"{name} must be [{count}, {size}] of {x.dtype}, got {given}.")
    if up.dtype != x.dtype or down.dtype != x.dtype:
        raise ToolkitError(f"experts needs one dtype for x, up and down, got {x.dtype}, {up.dtype} and {down.dtype}.")
