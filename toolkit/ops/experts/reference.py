"""The experts of an MoE layer as one op, in plain torch: the specification.

T tokens, K experts per token, R = T K rows, E experts, hidden size H, intermediate size I; G = 2 where gated, else 1.
"""

import torch
from torch import Tensor

from toolkit.ops.activation.kinds import find
from toolkit.ops.dispatch_plan.reference import expert_of_rows
from toolkit.ops.grouped_linear.reference import combine, grouped_linear, grouped_linear_backward
from toolkit.ops.rowwise import elementwise, upcast

SCORE_POSITIONS = ("activation", "combine", "input")


def is_gated(up: Tensor, down: Tensor, transposed: bool) -> bool:
    """Whether ``up`` has a gate: twice as many outputs as ``down`` has inputs."""
    return up.shape[2 if transposed else 1] != down.shape[1 if transposed else 2]


def halves(z: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gate and up [R, I] of z [R, 2 I], in halves or interleaved."""
    return (z[:, ::2], z[:, 1::2]) if interleaved else z.tensor_split(2, -1)  # type: ignore[return-value]


def activate(z: Tensor, activation: str, gated: bool, interleaved: bool) -> Tensor:
    """a [R, I] of the pre-activation z [R, G I], in float32 or wider."""
    function, z = find(activation), upcast(z)
    if not gated:
        return elementwise(function.value, z)
    gate, up = (part.contiguous() for part in halves(z, interleaved))
    if function.arguments == 2:
        return elementwise(function.value, gate, up)
    return elementwise(function.value, gate) * up


def activate_backward(da: Tensor, z: Tensor, activation: str, gated: bool, interleaved: bool) -> Tensor:
    """dz [R, G I] of da [R, I], in float32 or wider."""
    function, z = find(activation), upcast(z)
    if not gated:
        return da * elementwise(function.derivative, z)
    gate, up = (part.contiguous() for part in halves(z, interleaved))
    if function.arguments == 2:
        slopes = [elementwise(lambda g, u, i=i: function.derivative(g, u)[i], gate, up) for i in (0, 1)]
        to_gate, to_up = da * slopes[0], da * slopes[1]
    else:
        to_gate = da * up * elementwise(function.derivative, gate)
        to_up = da * elementwise(function.value, gate)
    return torch.stack([to_gate, to_up], -1).flatten(1) if interleaved else torch.cat([to_gate, to_up], -1)


def weight_of_rows(topk_weights: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """[R, 1] the routing weight of each row, in float32 or wider; 0 for rows of skipped pairs."""
    used = torch.arange(len(order), device=order.device) < offsets[-1]
    return torch.where(used, upcast(topk_weights).flatten()[order], 0.0)[:, None]


def _bias_of_rows(bias: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """[R, N]: the bias [E, N] of each row's expert, upcast; 0 for rows of none."""
    expert = expert_of_rows(order, offsets)
    own = upcast(bias[expert.clamp(max=bias.shape[0] - 1)])
    return torch.where((expert < bias.shape[0])[:, None], own, 0.0)


def experts(
    x: Tensor, topk_weights: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor,
    activation: str, score_position: str, transposed: bool, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [T, H], z [R, G I]): see ``toolkit.ops.experts.experts``. z has x's dtype before the activation."""
    plan = (order, rows, offsets, tiles)
    gated = is_gated(up, down, transposed)
    weight = weight_of_rows(topk_weights, order, offsets)
    if score_position == "input":
        token = order // max(rows.shape[1], 1)
        source = (upcast(x)[token] * weight.to(upcast(x).dtype)).to(x.dtype)
        z = grouped_linear(source, up, up_bias, *plan, False, transposed)
    else:
        z = grouped_linear(x, up, up_bias, *plan, True, transposed)
    a = activate(z, activation, gated, interleaved)
    if score_position != "activation":
        y = grouped_linear(a.to(x.dtype), down, down_bias, *plan, False, transposed)
        return combine(y, rows, topk_weights if score_position == "combine" else None), z
    weight = weight.to(a.dtype)
    y = grouped_linear((a * weight).to(x.dtype), down, None, *plan, False, transposed)
    if down_bias is not None:
        y = (upcast(y) + weight * _bias_of_rows(down_bias, order, offsets)).to(x.dtype)
    return combine(y, rows, None), z


def experts_backward(
    grad: Tensor, x: Tensor, topk_weights: Tensor, z: Tensor, up: Tensor, down: Tensor, down_bias: Tensor | None,
    order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor,
    activation: str, score_position: str, transposed: bool, interleaved: bool,
    need_x: bool, need_topk_weights: bool, need_up: bool, need_up_bias: bool, need_down: bool, need_down_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to x, topk_weights, up, up_bias, down and down_bias; an empty tensor for one that is not needed.

    Neither the outputs of ``down`` nor the activations are saved. With g the gradient of a row's token, w its routing
    weight and ``v = W_down^T g``: for score positions activation and combine ``dw = <v, a> + <b_down, g>``,
    ``da = w v``, ``dW_down = (w g) a^T``; for input w = 1 there, and ``dw = <W_up^T dz, x>``, ``dx = w W_up^T dz``.
    """
    plan = (order, rows, offsets, tiles)
    gated = is_gated(up, down, transposed)
    token = order // max(rows.shape[1], 1)
    used = (torch.arange(len(order), device=x.device) < offsets[-1])[:, None]
    g = torch.where(used, upcast(grad)[token], 0.0)
    weight = weight_of_rows(topk_weights, order, offsets).to(g.dtype)
    inner = weight if score_position != "input" else torch.ones_like(weight)
    a = torch.where(used, activate(z, activation, gated, interleaved), 0.0)
    v = grouped_linear_backward(g, a, down, *plan, False, transposed, True, False, False)[0]
    _, to_down, to_down_bias = grouped_linear_backward(
        g * inner, a, down, *plan, False, transposed, False, need_down, need_down_bias
    )
    dz = torch.where(used, activate_backward(v * inner, z, activation, gated, interleaved), 0.0)
    source = upcast(x)[token] if score_position != "input" else upcast(x)[token] * weight
    to_rows, to_up, to_up_bias = grouped_linear_backward(
        dz, torch.where(used, source, 0.0), up, *plan, False, transposed, True, need_up, need_up_bias
    )
    if score_position == "input":
        to_weight = (to_rows * upcast(x)[token]).sum(-1)
    else:
        to_weight = (v * a).sum(-1)
        if down_bias is not None:
            to_weight = to_weight + (_bias_of_rows(down_bias, order, offsets) * g).sum(-1)
    to_x = combine(to_rows * weight if score_position == "input" else to_rows, rows, None)
    to_topk_weights = to_weight.view(rows.shape)
    if rows.numel():
        to_topk_weights = torch.where(rows >= 0, to_weight[rows.clamp_min(0)], 0.0)
    none = x.new_empty(0)

    def kept(value: Tensor, needed: bool, like: Tensor) -> Tensor:
        return value.to(like.dtype) if needed else none.clone()

    return (
        kept(to_x, need_x, x), kept(to_topk_weights, need_topk_weights, topk_weights),
        kept(to_up, need_up, up), kept(to_up_bias, need_up_bias, up),
        kept(to_down, need_down, down), kept(to_down_bias, need_down_bias, down),
    )  # fmt: skip


def experts_fake(
    x: Tensor, topk_weights: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor,
    activation: str, score_position: str, transposed: bool, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out, x.new_empty(rows.numel(), up.shape[2 if transposed else 1])


def experts_backward_fake(
    grad: Tensor, x: Tensor, topk_weights: Tensor, z: Tensor, up: Tensor, down: Tensor, down_bias: Tensor | None,
    order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor,
    activation: str, score_position: str, transposed: bool, interleaved: bool,
    need_x: bool, need_topk_weights: bool, need_up: bool, need_up_bias: bool, need_down: bool, need_down_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = 2 if transposed else 1

    def like(needed: bool, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape if needed else (0,), dtype=dtype, device=x.device)

    return (
        like(need_x, x.dtype, *x.shape), like(need_topk_weights, topk_weights.dtype, *topk_weights.shape),
        like(need_up, up.dtype, *up.shape), like(need_up_bias, up.dtype, up.shape[0], up.shape[outputs]),
        like(need_down, down.dtype, *down.shape), like(need_down_bias, down.dtype, down.shape[0], down.shape[outputs]),
    )  # fmt: skip
