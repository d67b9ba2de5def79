"""What a layer of experts computes, from routed tokens to their sum: the fused op, or its parts where more is wanted.

T tokens, K slots a token, R = T K rows, E experts, H wide outside, I inside; G = 2 where gated, else 1.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.activation import activation
from toolkit.ops.dispatch_plan import DispatchPlan, dispatch_plan
from toolkit.ops.experts import experts
from toolkit.ops.gated_activation import gated_activation
from toolkit.ops.grouped_linear import combine, grouped_linear
from toolkit.ops.lora_linear import lora_add

if TYPE_CHECKING:
    from toolkit.moe.exchange import ExpertParallel


class ExpertWeights(NamedTuple):
    """Weights of all experts of a layer, and their layout: see ``toolkit.ops.experts.experts``.

    parallel: where the weights are one rank's share of the experts, how their tokens come and go.
    """

    up: Tensor
    down: Tensor
    kind: str
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    site: str = "activation"
    transposed: bool = False
    interleaved: bool = False
    parallel: "ExpertParallel | None" = None

    @property
    def num_experts(self) -> int:
        """Of the layer, on all ranks together."""
        return self.up.shape[0] * (1 if self.parallel is None else self.parallel.size)

    @property
    def gated(self) -> bool:
        return self.up.shape[2 if self.transposed else 1] != self.down.shape[1 if self.transposed else 2]


class ExpertAdapters(NamedTuple):
    """Low-rank adapters of each expert, ``W + scaling B A``: a [E, r, in], b [E, out, r], scaling a number; or None."""

    up: tuple[Tensor, Tensor, float] | None = None
    down: tuple[Tensor, Tensor, float] | None = None


def mix(
    x: Tensor,
    ids: Tensor,
    scores: Tensor,
    weights: ExpertWeights,
    *,
    adapters: ExpertAdapters | None = None,
    post: Callable[[Tensor], Tensor] | None = None,
    recompute: bool = False,
) -> Tensor:
    """[T, H]: every token through the experts it was routed to, in the order of its slots.

    x [T, H]; ids [T, K] int64, ``weights.num_experts`` for a slot to skip; scores [T, K]. post: a norm of every
    expert's output [R, H], before the scores. recompute: save nothing of R rows for the backward. Adapters and
    ``post`` take the op apart: the same mathematics, with its parts saved one by one. Neither goes with experts that
    are shared out to ranks (ToolkitError).
    """
    if weights.parallel is not None:
        if adapters is not None or post is not None:
            extra = "adapters" if adapters is not None else "a norm of their outputs"
            raise ToolkitError(f"These experts are shared out to ranks and have {extra}; allowed are plain ones.")
        return weights.parallel.mix(x, ids, scores, weights, recompute)
    plan = dispatch_plan(ids, weights.num_experts)
    if adapters is None and post is None:
        return experts(
            x, scores, weights.up, weights.down, plan, weights.kind,
            up_bias=weights.up_bias, down_bias=weights.down_bias, score_position=weights.site,
            transposed=weights.transposed, interleaved=weights.interleaved, recompute=recompute,
        )  # fmt: skip
    return _in_parts(x, scores, weights, plan, adapters or ExpertAdapters(), post)


def activated(z: Tensor, weights: ExpertWeights) -> Tensor:
    """[R, I] of the pre-activation z [R, G I]."""
    if not weights.gated:
        return activation(z, weights.kind)
    if weights.interleaved:
        return gated_activation(z[:, ::2], z[:, 1::2], weights.kind)
    gate, up = z.tensor_split(2, -1)
    return gated_activation(gate, up, weights.kind)


def _in_parts(
    x: Tensor, scores: Tensor, weights: ExpertWeights, plan: DispatchPlan, adapters: ExpertAdapters,
    post: Callable[[Tensor], Tensor] | None,
) -> Tensor:  # fmt: skip
    slots = max(plan.rows.shape[1], 1)
    of_row = plan.expert_of_rows()
    of_row = torch.where(of_row < weights.num_experts, of_row, -1)  # rows of skipped slots have no adapter

    def adapted(base: Tensor, source: Tensor, adapter: tuple[Tensor, Tensor, float] | None) -> Tensor:
        if adapter is None:
            return base
        a, b, scaling = adapter
        factors = torch.full((len(a),), scaling, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        return lora_add(base, source, a, b, factors, of_row)

    rows = x[plan.order // slots]
    if weights.site == "input":
        rows = (rows * scores.flatten()[plan.order][:, None]).to(x.dtype)
    z = grouped_linear(rows, weights.up, weights.up_bias, plan, transposed=weights.transposed)
    z = adapted(z, rows, adapters.up)
    a = activated(z, weights)
    y = grouped_linear(a, weights.down, weights.down_bias, plan, transposed=weights.transposed)
    y = adapted(y, a, adapters.down)
    if post is not None:
        y = post(y)
    return combine(y, plan.rows, None if weights.site == "input" else scores)
