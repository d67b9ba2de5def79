"""The experts of a mixture (Shazeer et al., 2017): two grouped products and what lies between them, as one op."""

from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.activation.kinds import find
from toolkit.ops.experts import reference
from toolkit.ops.grouped_linear import Plan, grouped_linear
from toolkit.ops.registry import register

__all__ = ["SITES", "experts"]

SITES = reference.SITES
_FLAGS = 4  # kind, site, transposed, interleaved


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, scores, up, _, down, down_bias, *plan = inputs[:-_FLAGS]
    ctx.flags = inputs[-_FLAGS:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, scores, output[1], up, down, down_bias, *plan)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:6]
    found = _BACKWARD(grad, *ctx.saved_tensors, *ctx.flags, *needs)
    return *(one if need else None for one, need in zip(found, needs)), *[None] * (4 + _FLAGS)


_ARGUMENTS = (
    "Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, Tensor order, Tensor rows, Tensor offsets,"
    " Tensor tiles, str kind, str site, bool transposed, bool interleaved"
)
_BACKWARD = register(
    "experts_backward(Tensor grad, Tensor x, Tensor scores, Tensor z, Tensor up, Tensor down, Tensor? down_bias,"
    " Tensor order, Tensor rows, Tensor offsets, Tensor tiles, str kind, str site, bool transposed, bool interleaved,"
    " bool need_x, bool need_scores, bool need_up, bool need_up_bias, bool need_down, bool need_down_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.experts_backward,
    fake=reference.experts_backward_fake,
    triton="toolkit.ops.experts.triton_backward.experts_backward",
)
_FORWARD = register(
    f"experts(Tensor x, Tensor scores, {_ARGUMENTS}) -> (Tensor, Tensor)",
    reference=reference.experts,
    fake=reference.experts_fake,
    triton="toolkit.ops.experts.triton.experts",
    backward=_backward,
    setup_context=_setup_context,
)


class _Recomputed(torch.autograd.Function):
    """``experts`` that saves no pre-activation: the backward takes the first product again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.flags = arguments[-_FLAGS:]
        ctx.save_for_backward(*arguments[:-_FLAGS])
        return _FORWARD(*arguments)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scores, up, up_bias, down, down_bias, *plan = ctx.saved_tensors
        _, site, transposed, _ = ctx.flags
        if site == "input":
            order, rows, offsets, _ = plan
            weight = reference.score_of_rows(scores, order, offsets)
            source = (x[order // max(rows.shape[1], 1)].to(weight.dtype) * weight).to(x.dtype)
            z = grouped_linear(source, up, up_bias, tuple(plan), transposed=transposed)
        else:
            z = grouped_linear(x, up, up_bias, tuple(plan), gather=True, transposed=transposed)
        needs = ctx.needs_input_grad[:6]
        found = _BACKWARD(grad, x, scores, z, up, down, down_bias, *plan, *ctx.flags, *needs)
        return *(one if need else None for one, need in zip(found, needs)), *[None] * (4 + _FLAGS)


def experts(
    x: Tensor,
    scores: Tensor,
    up: Tensor,
    down: Tensor,
    plan: Plan,
    kind: str,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    site: str = "activation",
    transposed: bool = False,
    interleaved: bool = False,
    recompute: bool = False,
    impl: str | None = None,
) -> Tensor:
    """``out[t] = sum over slots k of s W_down[e] act(W_up[e] x[t] + b_up[e]) + s b_down[e]``, e and s those of (t, k).

    plan: of ``toolkit.ops.dispatch_plan`` for T tokens of K slots and E experts; skipped slots add nothing.
    x: [T, H]; scores: [T, K], the slots' weights s, in x's dtype or float32 (the same for float64).
    up: [E, G I, H], down: [E, H, I]; ``transposed``: [E, H, G I] and [E, I, H]. up_bias: [E, G I], down_bias: [E, H],
    or None. G is 2 where there is a gate, gate before up in halves, or taking turns (``interleaved``), else 1.
    kind: of ``toolkit.ops.gated_activation`` with a gate, of ``toolkit.ops.activation`` without one.
    site: where s is multiplied in: at the "activation", which leaves an unweighted sum at the end (the same
    mathematics as at the "combine"), or at the "input", ``W_up[e] (s x)`` and nowhere else (Llama 4).
    Returns [T, H] in x's dtype. Products add in float32 (float64 for float64); what is stored on the way has x's dtype.

    Numerics: a token's bits depend on its own row, experts and scores alone, added up in the order of its slots.
    Gradients reach x, scores, weights and biases; a weight's adds its expert's rows in ascending order. No atomics,
    the same bits every run, no host sync on CUDA.
    Saved for backward: x, the pre-activation [R, G I], scores and plan; no activation, none of the experts' outputs.
    recompute: save no pre-activation either; the backward takes the first product again, to the same bits. By device
    only, without ``impl``.
    Raises ToolkitError for an unknown kind or site, or shapes or dtypes that do not fit.
    """
    _check(x, scores, up, down, plan, kind, up_bias, down_bias, site, transposed)
    arguments = (x, scores, up, up_bias, down, down_bias, *plan, kind, site, transposed, interleaved)
    if recompute and torch.is_grad_enabled():
        return _Recomputed.apply(*arguments)
    return _FORWARD.select(impl)(*arguments)[0]


def _check(
    x: Tensor, scores: Tensor, up: Tensor, down: Tensor, plan: Plan, kind: str, up_bias: Tensor | None,
    down_bias: Tensor | None, site: str, transposed: bool,
) -> None:  # fmt: skip
    """ToolkitError, in one sentence, for arguments that do not fit."""
    _, rows, offsets, _ = plan
    if site not in SITES:
        raise ToolkitError(f"site is {site!r}; allowed are {', '.join(SITES)}.")
    count = len(offsets) - 1
    if up.dim() != 3 or down.dim() != 3 or x.dim() != 2:
        raise ToolkitError(
            f"experts got x {list(x.shape)}, up {list(up.shape)} and down {list(down.shape)}; allowed are [T, H], "
            "[E, G I, H] and [E, H, I]."
        )
    width = x.shape[1]
    outer, wide = (up.shape[1], up.shape[2]) if transposed else (up.shape[2], up.shape[1])
    inner, back = (down.shape[1], down.shape[2]) if transposed else (down.shape[2], down.shape[1])
    gated = wide != inner
    if (outer, back) != (width, width) or wide not in (inner, 2 * inner) or {up.shape[0], down.shape[0]} != {count}:
        raise ToolkitError(
            f"experts got x {list(x.shape)}, up {list(up.shape)}, down {list(down.shape)} and a plan of {count} "
            "experts; they do not fit together."
        )
    find(kind, plain=not gated)
    if rows.shape[0] != x.shape[0] or scores.shape != rows.shape:
        raise ToolkitError(
            f"experts got x {list(x.shape)}, scores {list(scores.shape)} and a plan of slots {list(rows.shape)}; "
            "allowed are [T, H], [T, K] and [T, K]."
        )
    for name, bias, size in (("up_bias", up_bias, wide), ("down_bias", down_bias, width)):
        if bias is not None and (bias.shape != (count, size) or bias.dtype != x.dtype):
            raise ToolkitError(
                f"{name} is {list(bias.shape)} of {bias.dtype}; allowed is [{count}, {size}] of {x.dtype}."
            )
    if up.dtype != x.dtype or down.dtype != x.dtype:
        raise ToolkitError(f"experts got x of {x.dtype}, weights of {up.dtype} and {down.dtype}; they must be equal.")
