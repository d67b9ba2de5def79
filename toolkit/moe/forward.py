"""``moe_forward``: a layer's experts from routed tokens to their sum.

T tokens, K experts per token, R = T K rows, E experts, hidden size H, intermediate size I; G = 2 with a gate, else 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.moe.dispatchers import LOCAL, Dispatcher, Exchange, LocalDispatcher, ReplicatedTokensDispatcher
from toolkit.moe.pipeline import pipelined_experts
from toolkit.moe.weights import ExpertAdapters, ExpertWeights, Factors
from toolkit.ops.collectives import gather_from_ranks, split_to_ranks
from toolkit.ops.dispatch_plan import DispatchPlan
from toolkit.ops.experts import experts
from toolkit.ops.experts.rows import activate
from toolkit.ops.grouped_linear import combine, grouped_linear
from toolkit.ops.lora_linear import lora_add
from toolkit.ops.rowwise import upcast


def moe_forward(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    dispatcher: Dispatcher = LOCAL,
    *,
    adapters: ExpertAdapters | None = None,
    post_norm: Callable[[Tensor], Tensor] | None = None,
    recompute: bool = False,
) -> Tensor:
    """[T, H]: dispatch, grouped GEMMs of the experts, combine: every token's experts summed in order of k.

    Args:
        x: [T, H], this rank's tokens.
        topk_ids: [T, K] integers; the total number of experts (on all ranks) for a pair to skip.
        topk_weights: [T, K].
        weights: the experts of this rank.
        dispatcher: how rows reach the experts: ``LOCAL`` where this rank has all of them, or an
            ``ExpertParallelDispatcher``, or a ``ReplicatedTokensDispatcher`` where all ranks have the same tokens. All
            ranks of the latter two must call this, those without a token too.
        adapters: low-rank adapters of the experts.
        post_norm: a norm of every expert's output [R, H], before it is weighted.
        recompute: save no tensors of R rows for the backward where they can be recomputed.

    Returns:
        [T, H] in x's dtype.

    Raises:
        ToolkitError: for shapes that do not fit, and for adapters or post_norm with experts that are sharded.

    Numerics: batch-invariant, and bitwise identical for every dispatcher, number of ranks and chunks; so are the
    gradients of x and topk_weights of an ``ExpertParallelDispatcher``. With adapters or post_norm the op runs in parts,
    each of which saves its own inputs for the backward.
    """
    if x.dim() != 2 or topk_ids.shape != topk_weights.shape or topk_ids.shape[:-1] != x.shape[:-1]:
        raise ToolkitError(
            f"moe_forward needs x [T, H], topk_ids [T, K] and topk_weights [T, K], got {list(x.shape)}, "
            f"{list(topk_ids.shape)} and {list(topk_weights.shape)}."
        )
    in_parts = adapters is not None or post_norm is not None
    if in_parts and not isinstance(dispatcher, LocalDispatcher):
        extra = "adapters" if adapters is not None else "a norm of their outputs"
        raise ToolkitError(f"Experts that are sharded over ranks cannot have {extra}.")
    if isinstance(dispatcher, ReplicatedTokensDispatcher):
        group = dispatcher.group
        own_x, own_ids, own_weights = (split_to_ranks(one, 0, group) for one in (x, topk_ids, topk_weights))
        of_own = moe_forward(own_x, own_ids, own_weights, weights, dispatcher.of_shares, recompute=recompute)
        return gather_from_ranks(of_own, 0, len(x), group)
    dispatched = dispatcher.dispatch(topk_ids, weights.num_local_experts)
    if isinstance(dispatched, Exchange):
        return pipelined_experts(x, topk_weights, weights, dispatched, recompute)
    if in_parts:
        return _experts_in_parts(x, topk_weights, weights, dispatched, adapters or ExpertAdapters(), post_norm)
    layout = weights.layout
    return experts(  # its kernels gather the rows and combine the outputs
        x,
        topk_weights,
        weights.up,
        weights.down,
        dispatched,
        layout.activation,
        up_bias=weights.up_bias,
        down_bias=weights.down_bias,
        score_position=layout.score_position,
        transposed=layout.transposed,
        interleaved=layout.interleaved,
        recompute=recompute,
    )


def _experts_in_parts(
    x: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    plan: DispatchPlan,
    adapters: ExpertAdapters,
    post_norm: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """``experts`` as separate ops, with adapters on the GEMMs and a norm before the combine."""
    layout = weights.layout
    token_of_row = plan.order // max(plan.rows.shape[1], 1)
    expert_of_row = plan.expert_of_rows()
    # Rows of skipped pairs have no adapter.
    chosen = 0 if adapters.ids is None else adapters.ids[token_of_row]
    adapter_of_row = torch.where(expert_of_row < weights.num_local_experts, chosen, -1)

    def adapted(base: Tensor, source: Tensor, factors: Factors | None) -> Tensor:
        return base if factors is None else lora_add(base, source, *factors, adapter_of_row, groups=expert_of_row)

    rows = x[token_of_row]
    if layout.score_position == "input":
        rows = (rows * topk_weights.flatten()[plan.order][:, None]).to(x.dtype)
    z = adapted(
        grouped_linear(rows, weights.up, weights.up_bias, plan, transposed=layout.transposed), rows, adapters.up
    )
    # Each step rounds where ``experts`` does, so that rows without an adapter are bitwise identical.
    at_activation = layout.score_position == "activation" and post_norm is None
    activated = activate(upcast(z), layout.activation, weights.gated, layout.interleaved)
    if at_activation:
        weight = topk_weights.flatten()[plan.order][:, None].to(activated.dtype)
        a = (activated * weight).to(x.dtype)
        y = adapted(grouped_linear(a, weights.down, None, plan, transposed=layout.transposed), a, adapters.down)
        if weights.down_bias is not None:
            own = upcast(weights.down_bias[expert_of_row.clamp(max=weights.num_local_experts - 1)])
            y = (upcast(y) + weight * own).to(x.dtype)
        return combine(y, plan.rows, None)
    a = activated.to(x.dtype)
    y = grouped_linear(a, weights.down, weights.down_bias, plan, transposed=layout.transposed)
    y = adapted(y, a, adapters.down)
    if post_norm is not None:
        y = post_norm(y)
    return combine(y, plan.rows, None if layout.score_position == "input" else topk_weights)
