"""A layer's experts over an exchange between ranks: transfers of one chunk overlap the GEMMs of another.

T tokens of this rank, K experts per token, hidden size H; N rows that came to this rank in a chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from toolkit.moe.dispatchers import Exchange
from toolkit.moe.dispatchers.exchange_plan import schedule
from toolkit.moe.weights import ExpertLayout, ExpertWeights
from toolkit.ops.dispatch_plan import DispatchPlan
from toolkit.ops.experts.rows import (
    Gradients,
    RoutedRows,
    WeightOperands,
    experts_rows,
    experts_rows_backward,
    experts_weight_gradients,
)
from toolkit.ops.grouped_linear import combine
from toolkit.ops.transforms import first_derivative_only

Tensors = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""up, up_bias, down and down_bias of ``ExpertWeights``."""


def pipelined_experts(
    x: Tensor, topk_weights: Tensor, weights: ExpertWeights, exchange: Exchange, recompute: bool = False
) -> Tensor:
    """[T, H]: the sum over this rank's tokens' experts, which lie on all ranks.

    All ranks must call it, those without a token too, and all must run the backward.

    Args:
        x: [T, H].
        topk_weights: [T, K].
        weights: the experts of this rank.
        exchange: of ``ExpertParallelDispatcher.dispatch``.
        recompute: save no pre-activations.

    Numerics: the output is bitwise identical to ``toolkit.ops.experts`` on one rank, for any number of ranks and
    chunks. Gradients of x and topk_weights do not depend on those either; the weights' add the sums of ranks in order,
    each over its rows in order of (token, k): deterministic. They are sums over the group, not means.
    Saved for backward: rows received, pre-activations (not with ``recompute``), pairs and plans.
    """
    tensors = weights.up, weights.up_bias, weights.down, weights.down_bias
    out: Tensor = _PipelinedExperts.apply(x, topk_weights, *tensors, weights.layout, exchange, recompute)  # type: ignore[no-untyped-call]
    return out


def _run(chunks: int, backward: bool, **actions: Callable[[int], None]) -> None:
    for step in schedule(chunks, backward):
        actions[step.action](step.chunk)


class _PipelinedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weights: Tensor,
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        layout: ExpertLayout,
        exchange: Exchange,
        recompute: bool,
    ) -> Tensor:
        tensors, settings = (up, up_bias, down, down_bias), _settings(layout)
        count = len(exchange.chunks)
        sent: list[Any] = [None] * count
        done: list[Any] = [None] * count
        kept: list[list[Tensor]] = [[]] * count
        out = torch.empty_like(x)

        def send(index: int) -> None:
            chunk = exchange.chunks[index]
            pairs = exchange.send_pairs(chunk, topk_weights)
            sent[index] = pairs, exchange.send_rows(chunk, x)

        def compute(index: int) -> None:
            chunk = exchange.chunks[index]
            pairs, arrived = (pending.wait() for pending in sent[index])
            row, rows = exchange.receive(chunk, pairs, arrived, topk_weights.dtype)
            y, z = experts_rows(rows, *tensors, *settings)
            done[index] = exchange.send_back(chunk, y)
            kept[index] = [arrived, row, rows.expert, rows.topk_weights, *rows.plan, *([] if recompute else [z])]
            sent[index] = None

        def receive(index: int) -> None:
            chunk = exchange.chunks[index]
            factor = topk_weights[chunk.tokens] if layout.score_position == "combine" else None
            out[chunk.tokens] = combine(done[index].wait(), chunk.pairs.rows, factor)
            done[index] = None

        _run(count, False, send=send, compute=compute, receive=receive)
        ctx.exchange, ctx.layout, ctx.counts = exchange, layout, [len(part) for part in kept]
        ctx.save_for_backward(*tensors, *(tensor for part in kept for tensor in part))
        ctx.recompute, ctx.weights_dtype = recompute, topk_weights.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        exchange: Exchange = ctx.exchange
        up, up_bias, down, down_bias, *saved = ctx.saved_tensors
        tensors: Tensors = up, up_bias, down, down_bias
        settings = _settings(ctx.layout)
        count = len(exchange.chunks)
        kept = [[saved.pop(0) for _ in range(number)] for number in ctx.counts]
        sent: list[Any] = [None] * count
        done: list[Any] = [None] * count
        operands: list[WeightOperands] = []
        to_weights: list[Gradients] = []
        to_x = torch.empty_like(grad)
        top_k = exchange.chunks[0].pairs.rows.shape[1]
        to_topk_weights = grad.new_empty(len(grad), top_k, dtype=ctx.weights_dtype)

        def send(index: int) -> None:
            sent[index] = exchange.send_rows(exchange.chunks[index], grad)

        def compute(index: int) -> None:
            chunk = exchange.chunks[index]
            arrived, row, expert, factor, *rest = kept[index]
            rows = RoutedRows(arrived[row], expert, factor, DispatchPlan(*rest[:4]))
            z = None if ctx.recompute else rest[4]
            to_rows, to_factor, made = experts_rows_backward(sent[index].wait()[row], rows, z, *tensors, *settings)
            done[index] = exchange.send_back(chunk, to_rows), exchange.send_back(chunk, to_factor)
            operands.append(made)
            sent[index] = None

        def weigh(_: int) -> None:
            to_weights.append(_weight_gradients(exchange, kept, operands, tensors, ctx.layout))

        def receive(index: int) -> None:
            chunk = exchange.chunks[index]
            rows, values = (pending.wait() for pending in done[index])
            row = chunk.pairs.rows
            to_x[chunk.tokens] = combine(rows, row)
            padded = torch.cat([values, values.new_zeros(1)])  # row -1: a skipped pair
            to_topk_weights[chunk.tokens] = padded[row]
            done[index] = None

        _run(count, True, send=send, compute=compute, receive=receive, weights=weigh)
        given = (to_x, to_topk_weights, *to_weights[0])
        gradients = first_derivative_only("experts (sharded)", given, [grad, *tensors])
        return *(one if need else None for one, need in zip(gradients, ctx.needs_input_grad)), None, None, None


def _settings(layout: ExpertLayout) -> tuple[str, str, bool, bool]:
    return layout.activation, layout.score_position, layout.transposed, layout.interleaved


def _weight_gradients(
    exchange: Exchange, kept: list[list[Tensor]], operands: list[WeightOperands], tensors: Tensors, layout: ExpertLayout
) -> Gradients:
    """The weights' gradients from the operands of all chunks, sorted by sending rank, expert and (token, k)."""
    rank, device = exchange.transport.rank, tensors[0].device
    origins = []
    for chunk, (_, _, _, _, order, *_) in zip(exchange.chunks, kept):
        counts = exchange.received(chunk.pair_counts, device)
        origins.append(torch.arange(len(counts), device=device).repeat_interleave(counts)[order])
    together = WeightOperands(*(torch.cat(parts) for parts in zip(*operands)))
    order = torch.sort(torch.cat(origins) * exchange.num_local_experts + together.expert, stable=True).indices
    counts_by_rank = [
        sum(chunk.pair_counts[source][rank] for chunk in exchange.chunks) for source in range(exchange.transport.size)
    ]
    ranked = WeightOperands(*(part[order] for part in together))
    return experts_weight_gradients(ranked, counts_by_rank, *tensors, layout.transposed)
