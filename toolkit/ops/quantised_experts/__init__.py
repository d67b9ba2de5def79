"""The experts of an MoE layer with weights in few bits: the bits of ``experts`` with the dequantised weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from toolkit.ops.dispatch_plan import DispatchPlan
from toolkit.ops.quantised_experts import reference
from toolkit.ops.registry import Op, register

__all__ = ["CodedWeight", "quantised_experts"]

_TRITON = "toolkit.ops.quantised_experts.triton"
_CODED = "Tensor up_codes, Tensor[] up_scales, str up_format"
_DOWN = "Tensor down_codes, Tensor[] down_scales, str down_format"
_PLAN = "Tensor order, Tensor rows, Tensor offsets, Tensor tiles"
_FLAGS = "int inner, bool gated, str activation, str score_position, bool interleaved"


class CodedWeight(NamedTuple):
    """Experts' weights [E, N, K] as one quantised weight of E N outputs.

    Fields:
        codes: packed (``toolkit.ops.quantised_linear.packing``).
        scales: the format's.
        format: its name.
    """

    codes: Tensor
    scales: Sequence[Tensor]
    format: str


_BACKWARD: Op[tuple[Tensor, Tensor, Tensor, Tensor]] = register(
    f"quantised_experts_backward(Tensor grad, Tensor x, Tensor topk_weights, Tensor z, {_CODED}, {_DOWN},"
    f" Tensor? down_bias, {_PLAN}, {_FLAGS}, bool need_x, bool need_topk_weights, bool need_up_bias,"
    " bool need_down_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.quantised_experts_backward,
    fake=reference.quantised_experts_backward_fake,
    triton=f"{_TRITON}.quantised_experts_backward",
)
_ARGUMENTS = 19  # of the forward
_GRADIENTS = {0: 0, 1: 1, 5: 2, 9: 3}  # of an argument's gradient, its index in the results of the backward


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, topk_weights, up_codes, up_scales, up_format, up_bias, *down = inputs[:10]
    down_codes, down_scales, down_format, down_bias = down
    plan, ctx.flags = inputs[10:14], inputs[14:]
    ctx.mark_non_differentiable(output[1])
    ctx.formats, ctx.counts = (up_format, down_format), (len(up_scales), len(down_scales))
    ctx.biases = up_bias is not None, down_bias is not None
    ctx.save_for_backward(x, topk_weights, output[1], down_bias, *plan, up_codes, down_codes, *up_scales, *down_scales)


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    x, topk_weights, z, down_bias, *saved = ctx.saved_tensors
    plan, (up_codes, down_codes), scales = saved[:4], saved[4:6], saved[6:]
    up_scales, down_scales = scales[: ctx.counts[0]], scales[ctx.counts[0] :]
    coded = up_codes, up_scales, ctx.formats[0], down_codes, down_scales, ctx.formats[1]
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
    needs += [bias and ctx.needs_input_grad[at] for bias, at in zip(ctx.biases, (5, 9), strict=True)]
    results = _BACKWARD.gradient(grad, x, topk_weights, z, *coded, down_bias, *plan, *ctx.flags, *needs)
    found: list[Any] = [None] * _ARGUMENTS
    found[3], found[7] = [None] * ctx.counts[0], [None] * ctx.counts[1]
    for at, index in _GRADIENTS.items():
        found[at] = results[index] if needs[index] else None
    return tuple(found)


_OP: Op[tuple[Tensor, Tensor]] = register(
    f"quantised_experts(Tensor x, Tensor topk_weights, {_CODED}, Tensor? up_bias, {_DOWN}, Tensor? down_bias, {_PLAN},"
    f" {_FLAGS}) -> (Tensor out, Tensor z)",
    reference=reference.quantised_experts,
    fake=reference.quantised_experts_fake,
    triton=f"{_TRITON}.quantised_experts",
    backward=_gradients,
    setup_context=_save,
)


def quantised_experts(
    x: Tensor,
    topk_weights: Tensor,
    up: CodedWeight,
    down: CodedWeight,
    plan: DispatchPlan,
    inner: int,
    gated: bool,
    activation: str,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    score_position: str = "activation",
    interleaved: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``experts`` of the weights that ``up`` and ``down`` dequantise to, bitwise identical, without them in memory.

    Args:
        x: [T, H]; float32, float64, bfloat16 or float16.
        topk_weights: [T, K].
        up: [E, G I, H], G = 2 with a gate, else 1.
        down: [E, H, I].
        plan: of T tokens with K of E experts.
        inner: I.
        gated: whether ``up`` has a gate.
        activation: as for ``experts``.
        up_bias: [E, G I] or None.
        down_bias: [E, H] or None.
        score_position, interleaved: as for ``experts``.
        impl: None (by device), "reference", "cpu" or "triton".

    Returns:
        out: [T, H] in x's dtype.
        z: [R, G I] the pre-activation; no gradient.

    Raises:
        ToolkitError, RuntimeError: for shapes or dtypes that do not fit, or another format.

    Numerics: those of ``experts``. On CPU the codes of experts with up to 16 rows become numbers in registers, those of
    others by panels in a thread's memory; float64, and sizes G I or H that 16 does not divide, dequantise for the call,
    as a GPU does. Gradients to x, topk_weights and biases; codes and scales have none.
    """
    given = (*_tuple(up), up_bias, *_tuple(down), down_bias, *plan)
    flags = inner, gated, activation, score_position, interleaved
    return _OP.select(impl)(x, topk_weights, *given, *flags)


def _tuple(weight: CodedWeight) -> tuple[Tensor, list[Tensor], str]:
    return weight.codes, list(weight.scales), weight.format
