"""The experts of one rank on rows that came from any rank: forward, and the backward in two parts.

N rows in the order of their arrival, each with one expert and one score; n rows of a plan, sorted by expert. The
backward of rows and that of weights are apart, because the rows are waited for and the weights are not.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.moe.experts import ExpertWeights, activated
from toolkit.ops.dispatch_plan import DispatchPlan, dispatch_plan
from toolkit.ops.grouped_linear import grouped_linear
from toolkit.ops.rowwise import row_sum, widened


class Routed(NamedTuple):
    """Rows that a rank computes: x [N, H], their experts' numbers here [N] and scores [N], and the plan of them."""

    x: Tensor
    expert: Tensor
    scores: Tensor
    plan: DispatchPlan


def forward(rows: Routed, weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    """(y [N, H] by arrival, z [n, G I] by plan): outputs as ``experts`` has them before it adds, and pre-activations.

    At site "combine" the scores are left to the owner's ``combine``.
    """
    scores = torch.ones_like(rows.scores) if weights.site == "combine" else rows.scores
    return torch.ops.toolkit.experts(
        rows.x, scores[:, None], weights.up, weights.up_bias, weights.down, weights.down_bias, *rows.plan,
        weights.kind, weights.site, weights.transposed, weights.interleaved,
    )  # fmt: skip


class Factors(NamedTuple):
    """What weights' gradients are made of, a row each: expert, and the two factors of each product's gradient."""

    expert: Tensor
    to_up: Tensor
    source: Tensor
    to_down: Tensor
    activation: Tensor


def backward(grad: Tensor, rows: Routed, z: Tensor | None, weights: ExpertWeights) -> tuple[Tensor, Tensor, Factors]:
    """(dx [N, H] and ds [N] by arrival, factors by plan) of grad [N, H], the gradient of each row's token.

    The formulas are those of ``toolkit.ops.experts.reference.experts_backward``; a row's bits depend on that row alone.
    z None: the first product is taken again.
    """
    plan, dtype = rows.plan, rows.x.dtype
    g, x, s = grad[plan.order], rows.x[plan.order], widened(rows.scores[plan.order])[:, None]
    at_input = weights.site == "input"
    source = (x * s).to(dtype) if at_input else x
    if z is None:
        z = grouped_linear(source, weights.up, weights.up_bias, plan, transposed=weights.transposed)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        a = activated(z, weights)
    v = grouped_linear(g, weights.down, None, plan, transposed=not weights.transposed)
    (to_up,) = torch.autograd.grad(a, z, v if at_input else (v * s).to(dtype))
    a = a.detach()
    to_rows = grouped_linear(to_up, weights.up, None, plan, transposed=not weights.transposed)
    if at_input:
        to_score = row_sum(widened(to_rows) * widened(x))
        to_x = (to_rows * s).to(dtype)
    else:
        to_score = row_sum(widened(v) * widened(a))
        if weights.down_bias is not None:
            to_score = to_score + row_sum(widened(g) * widened(weights.down_bias[rows.expert[plan.order]]))
        to_x = to_rows
    back = plan.rows[:, 0]
    factors = Factors(rows.expert[plan.order], to_up, source, g if at_input else (g * s).to(dtype), a)
    return to_x[back], to_score[back, 0].to(rows.scores.dtype), factors


Gradients = dict[str, Tensor]
"""Of the fields of ``ExpertWeights``, by name."""


def weight_gradients(factors: Factors, count: list[int], weights: ExpertWeights) -> Gradients:
    """Gradients of weights and biases, of rows sorted by the rank that sent them (count[rank] each), then by expert.

    Each rank's rows make one sum, and the sums are added in the order of the ranks: the bits that a single rank gets
    which takes those ranks' batches one by one.
    """
    total: Gradients = {}
    begin = 0
    for rows in count:
        part = Factors(*(one[begin : begin + rows] for one in factors))
        begin += rows
        if rows:
            for name, value in _of_one_rank(part, weights).items():
                total[name] = total[name].add_(value) if name in total else value
    for name in ("up", "down", "up_bias", "down_bias"):
        parameter = getattr(weights, name)
        if parameter is not None and name not in total:
            total[name] = torch.zeros_like(parameter)
    return total


def _of_one_rank(part: Factors, weights: ExpertWeights) -> Gradients:
    plan = dispatch_plan(part.expert[:, None], weights.up.shape[0])
    found: Gradients = {}
    for name, grad, source in (("up", part.to_up, part.source), ("down", part.to_down, part.activation)):
        bias = getattr(weights, f"{name}_bias") is not None
        _, to_weight, to_bias = torch.ops.toolkit.grouped_linear_backward(
            grad, source, getattr(weights, name), *plan, False, weights.transposed, False, True, bias
        )
        found[name] = to_weight
        if bias:
            found[f"{name}_bias"] = to_bias
    return found
