"""``experts`` on rows with one expert each, as expert parallelism computes them: forward, and backward in two steps.

The backward to the rows and the one to the weights are separate because other ranks wait for the rows' gradients and
not for the weights'. N rows in order of arrival, each with one expert and one routing weight; a plan sorts them by
expert. E experts on this rank, hidden size H, intermediate size I; G = 2 with a gate, else 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.ops.activation import activation as plain_activation
from toolkit.ops.dispatch_plan import DispatchPlan, dispatch_plan
from toolkit.ops.experts.reference import is_gated
from toolkit.ops.gated_activation import gated_activation
from toolkit.ops.grouped_linear import grouped_linear
from toolkit.ops.rowwise import row_sum, upcast


class RoutedRows(NamedTuple):
    """Rows on the rank that computes them.

    Fields:
        x: [N, H].
        expert: [N] int64, the index of each row's expert on this rank.
        topk_weights: [N].
        plan: of ``expert[:, None]``.
    """

    x: Tensor
    expert: Tensor
    topk_weights: Tensor
    plan: DispatchPlan


class WeightOperands(NamedTuple):
    """The operands of the weights' gradients, one row per routed row, in plan order.

    Fields:
        expert: [N] int64.
        to_up, source: [N, G I] and [N, H], whose outer products sum to the gradient of up.
        to_down, activated: [N, H] and [N, I], whose outer products sum to the gradient of down.
    """

    expert: Tensor
    to_up: Tensor
    source: Tensor
    to_down: Tensor
    activated: Tensor


def activate(z: Tensor, activation: str, gated: bool, interleaved: bool) -> Tensor:
    """[R, I] of the pre-activation z [R, G I], differentiable."""
    if not gated:
        return plain_activation(z, activation)
    if interleaved:
        return gated_activation(z[:, ::2], z[:, 1::2], activation)
    gate, up = z.tensor_split(2, -1)
    return gated_activation(gate, up, activation)


def experts_rows(
    rows: RoutedRows,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    score_position: str,
    transposed: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """(y [N, H] by arrival, z [N, G I] in plan order): outputs before the combine, and pre-activations.

    Weights and settings are those of ``toolkit.ops.experts.experts``. At score position "combine" the routing weights
    are left to ``combine``. No autograd: see ``experts_rows_backward``.
    """
    factor = torch.ones_like(rows.topk_weights) if score_position == "combine" else rows.topk_weights
    y, z = torch.ops.toolkit.experts(
        rows.x,
        factor[:, None],
        up,
        up_bias,
        down,
        down_bias,
        *rows.plan,
        activation,
        score_position,
        transposed,
        interleaved,
    )
    return y, z


def experts_rows_backward(
    grad: Tensor,
    rows: RoutedRows,
    z: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    score_position: str,
    transposed: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor, WeightOperands]:
    """(dx [N, H] and dw [N] by arrival, operands in plan order) of grad [N, H], the gradient of each row's token.

    The formulas are those of ``toolkit.ops.experts.reference.experts_backward``; the result is batch-invariant.

    Args:
        z: of ``experts_rows``; None recomputes it.
    """
    plan, dtype = rows.plan, rows.x.dtype
    g, x, w = grad[plan.order], rows.x[plan.order], upcast(rows.topk_weights[plan.order])[:, None]
    at_input = score_position == "input"
    source = (x * w).to(dtype) if at_input else x
    if z is None:
        z = grouped_linear(source, up, up_bias, plan, transposed=transposed)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        a = activate(z, activation, is_gated(up, down, transposed), interleaved)
    v = grouped_linear(g, down, None, plan, transposed=not transposed)
    (to_up,) = torch.autograd.grad(a, z, v if at_input else (v * w).to(dtype))
    a = a.detach()
    to_rows = grouped_linear(to_up, up, None, plan, transposed=not transposed)
    if at_input:
        to_weight = row_sum(upcast(to_rows) * upcast(x))
        to_x = (to_rows * w).to(dtype)
    else:
        to_weight = row_sum(upcast(v) * upcast(a))
        if down_bias is not None:
            to_weight = to_weight + row_sum(upcast(g) * upcast(down_bias[rows.expert[plan.order]]))
        to_x = to_rows
    by_arrival = plan.rows[:, 0]
    operands = WeightOperands(rows.expert[plan.order], to_up, source, g if at_input else (g * w).to(dtype), a)
    return to_x[by_arrival], to_weight[by_arrival, 0].to(rows.topk_weights.dtype), operands


Gradients = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""To up, up_bias, down and down_bias; None for a bias that there is not."""


def experts_weight_gradients(
    operands: WeightOperands,
    counts: Sequence[int],
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    transposed: bool,
) -> Gradients:
    """The gradients of weights and biases.

    Args:
        operands: sorted by the rank that sent the rows, then by expert.
        counts: rows from each rank.

    Numerics: each rank's rows make one sum, and the sums are added in rank order: bitwise identical to a single rank
    that processes those ranks' batches one by one.
    """
    total: list[Tensor | None] = [None] * 4
    begin = 0
    for count in counts:
        part = WeightOperands(*(one[begin : begin + count] for one in operands))
        begin += count
        if count:
            found = _of_one_rank(part, up, up_bias is not None, down, down_bias is not None, transposed)
            for index, one in enumerate(found):
                before = total[index]
                total[index] = one if before is None or one is None else before.add_(one)
    for index, parameter in enumerate((up, up_bias, down, down_bias)):
        if parameter is not None and total[index] is None:
            total[index] = torch.zeros_like(parameter)
    to_up, to_up_bias, to_down, to_down_bias = total
    assert to_up is not None
    assert to_down is not None
    return to_up, to_up_bias, to_down, to_down_bias


def _of_one_rank(
    part: WeightOperands, up: Tensor, up_bias: bool, down: Tensor, down_bias: bool, transposed: bool
) -> Gradients:
    plan = dispatch_plan(part.expert[:, None], up.shape[0])

    def gradients(grad: Tensor, source: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        _, to_weight, to_bias = torch.ops.toolkit.grouped_linear_backward(
            grad, source, weight, *plan, False, transposed, False, True, bias
        )
        return to_weight, to_bias if bias else None

    return *gradients(part.to_up, part.source, up, up_bias), *gradients(part.to_down, part.activated, down, down_bias)
