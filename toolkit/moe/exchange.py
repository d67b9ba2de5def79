"""Expert parallelism: experts shared out to ranks, token rows exchanged in chunks while other chunks are computed.

T tokens of this rank, K slots a token, H wide, W ranks, E experts in all.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.moe import rows as local
from toolkit.moe.exchange_plan import ChunkPlan, Counts, check_experts, plan_exchange, schedule, unpacked
from toolkit.moe.experts import ExpertWeights
from toolkit.moe.rows import Factors, Routed
from toolkit.moe.transport import Pending, Transport, transport_of
from toolkit.ops.dispatch_plan import DispatchPlan, dispatch_plan
from toolkit.ops.grouped_linear import combine

_TENSORS = ("up", "down", "up_bias", "down_bias")


class ExpertParallel:
    """A layer's experts over a group: rank r of W owns experts r E / W to (r + 1) E / W.

    group: of ``torch.distributed`` (gloo or NCCL), best one that nothing else uses, since all its ranks must make the
    same calls in the same order; None is one rank alone. chunks: runs of tokens whose transfers overlap each
    other's products. transport: takes the group's place. All ranks must give the same number of chunks.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, chunks: int = 2, transport: Transport | None = None
    ) -> None:
        if chunks < 1:
            raise ToolkitError(f"chunks is {chunks}; it must be 1 or more.")
        self.transport = transport if transport is not None else transport_of(group)
        self.chunks = chunks

    @property
    def size(self) -> int:
        return self.transport.size

    def owned(self, num_experts: int) -> slice:
        """The experts of this rank. ToolkitError unless the ranks divide them."""
        count = check_experts(num_experts, self.size)
        return slice(self.transport.rank * count, (self.transport.rank + 1) * count)

    def mix(self, x: Tensor, ids: Tensor, scores: Tensor, weights: ExpertWeights, recompute: bool = False) -> Tensor:
        """[T, H]: as ``toolkit.moe.mix`` of all E experts, of which ``weights`` are this rank's.

        x [T, H], ids and scores [T, K] of this rank's tokens, ids of all E experts, E for a slot to skip. All ranks of
        the group must call it, those without a token too, and all backward.

        Numerics: the bits of the output are those of ``toolkit.ops.experts`` on one rank, whatever W and the chunks.
        Gradients of x and scores do not depend on W and the chunks either; those of weights add the sums of ranks in
        order, each over its rows by slot: no bit depends on timing. They are sums over the group, not means.
        Saved for backward: rows received, pre-activations (not with ``recompute``) and slots.
        """
        if x.dim() != 2 or ids.dim() != 2 or ids.shape != scores.shape or len(ids) != len(x) or ids.is_floating_point():
            raise ToolkitError(
                f"ExpertParallel got x {list(x.shape)}, ids {list(ids.shape)} of {ids.dtype} and scores "
                f"{list(scores.shape)}; allowed are [T, H], integers [T, K] and [T, K]."
            )
        plan = plan_exchange(ids, weights.up.shape[0] * self.size, self.chunks, self.transport)
        tensors = [getattr(weights, name) for name in _TENSORS]
        return _Exchanged.apply(x, scores, *tensors, _Exchange(self.transport, plan, weights, recompute))


class _Exchange:
    """One call's plan, and the transfers that are under way."""

    def __init__(self, transport: Transport, plan: list[ChunkPlan], weights: ExpertWeights, recompute: bool) -> None:
        self.transport, self.plan, self.recompute = transport, plan, recompute
        self.layout = weights._replace(up=None, down=None, up_bias=None, down_bias=None)  # type: ignore[arg-type]

    def weights(self, tensors: "tuple[Any, ...]") -> ExpertWeights:
        return self.layout._replace(**dict(zip(_TENSORS, tensors)))

    def send(self, chunk: ChunkPlan, x: Tensor) -> Pending:
        """Begin to send each token's row to the ranks of its experts."""
        return self.transport.exchange(x[chunk.tokens][chunk.token], chunk.row_counts)

    def send_back(self, chunk: ChunkPlan, values: Tensor) -> Pending:
        """Begin to send a row a slot back to the ranks of their tokens."""
        return self.transport.exchange(values, _reversed(chunk.slot_counts))

    def rows(self, chunk: ChunkPlan, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(row received, expert, score) of each slot received."""
        place, expert, scores = unpacked(slots, dtype)
        rank = self.transport.rank
        begins = torch.tensor([0, *accumulate(line[rank] for line in chunk.row_counts)][:-1], device=place.device)
        return place + begins.repeat_interleave(_received(chunk.slot_counts, rank, place.device)), expert, scores


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor, *rest: Any) -> Tensor:
        *tensors, exchange = rest
        weights = exchange.weights(tensors)
        count = len(exchange.plan)
        sent: list[Any] = [None] * count
        done: list[Any] = [None] * count
        kept: list[Any] = [None] * count
        out = torch.empty_like(x)

        def send(index: int) -> None:
            chunk = exchange.plan[index]
            slots = exchange.transport.exchange(chunk.packed(scores), chunk.slot_counts)
            sent[index] = slots, exchange.send(chunk, x)

        def compute(index: int) -> None:
            chunk = exchange.plan[index]
            slots, arriving = (pending.wait() for pending in sent[index])
            row, expert, score = exchange.rows(chunk, slots, scores.dtype)
            routed = Routed(arriving[row], expert, score, dispatch_plan(expert[:, None], weights.up.shape[0]))
            y, z = local.forward(routed, weights)
            done[index] = exchange.send_back(chunk, y)
            kept[index] = [arriving, row, expert, score, *routed.plan, *([] if exchange.recompute else [z])]
            sent[index] = None

        def receive(index: int) -> None:
            chunk = exchange.plan[index]
            factor = scores[chunk.tokens] if weights.site == "combine" else None
            out[chunk.tokens] = combine(done[index].wait(), chunk.slots.rows, factor)
            done[index] = None

        _run(count, False, send=send, compute=compute, receive=receive)
        ctx.exchange, ctx.counts = exchange, [len(tensors) for tensors in kept]
        ctx.save_for_backward(*tensors, *(tensor for tensors in kept for tensor in tensors))
        ctx.score_dtype = scores.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        exchange: _Exchange = ctx.exchange
        tensors, saved = ctx.saved_tensors[: len(_TENSORS)], list(ctx.saved_tensors[len(_TENSORS) :])
        weights = exchange.weights(tensors)
        count = len(exchange.plan)
        kept = [[saved.pop(0) for _ in range(number)] for number in ctx.counts]
        sent: list[Any] = [None] * count
        done: list[Any] = [None] * count
        factors: list[Factors] = []
        found: dict[str, Tensor] = {}
        to_x = torch.empty_like(grad)
        to_scores = grad.new_empty(len(grad), exchange.plan[0].slots.rows.shape[1], dtype=ctx.score_dtype)

        def send(index: int) -> None:
            sent[index] = exchange.send(exchange.plan[index], grad)

        def compute(index: int) -> None:
            chunk = exchange.plan[index]
            arriving, row, expert, score, *rest = kept[index]
            routed = Routed(arriving[row], expert, score, DispatchPlan(*rest[:4]))
            z = None if exchange.recompute else rest[4]
            to_rows, to_score, made = local.backward(sent[index].wait()[row], routed, z, weights)
            done[index] = exchange.send_back(chunk, to_rows), exchange.send_back(chunk, to_score)
            factors.append(made)
            sent[index] = None

        def weigh(_: int) -> None:
            found.update(_weight_gradients(exchange, kept, factors, weights))

        def receive(index: int) -> None:
            chunk = exchange.plan[index]
            rows, values = (pending.wait() for pending in done[index])
            to_x[chunk.tokens] = combine(rows, chunk.slots.rows)
            row = chunk.slots.rows
            padded = torch.cat([values, values.new_zeros(1)])  # row -1: a skipped slot
            to_scores[chunk.tokens] = padded[row]
            done[index] = None

        _run(count, True, send=send, compute=compute, receive=receive, weights=weigh)
        gradients = (to_x, to_scores, *(found.get(name) for name in _TENSORS))
        return *(one if need else None for one, need in zip(gradients, ctx.needs_input_grad)), None


def _run(chunks: int, backward: bool, **actions: Callable[[int], None]) -> None:
    for step in schedule(chunks, backward):
        actions[step.action](step.chunk)


def _weight_gradients(
    exchange: _Exchange, kept: list[list[Tensor]], factors: list[Factors], weights: ExpertWeights
) -> dict[str, Tensor]:
    """Factors of all chunks, sorted by the rank that sent them, expert, and slot, and the sums over them."""
    rank = exchange.transport.rank
    device = weights.up.device
    origins = []
    for chunk, (_, _, _, _, order, *_) in zip(exchange.plan, kept):
        counts = _received(chunk.slot_counts, rank, device)
        origins.append(torch.arange(len(counts), device=device).repeat_interleave(counts)[order])
    together = Factors(*(torch.cat(parts) for parts in zip(*factors)))
    origin = torch.cat(origins)
    order = torch.sort(origin * weights.up.shape[0] + together.expert, stable=True).indices
    count = [
        sum(chunk.slot_counts[source][rank] for chunk in exchange.plan) for source in range(exchange.transport.size)
    ]
    return local.weight_gradients(Factors(*(part[order] for part in together)), count, weights)


def _received(counts: Counts, rank: int, device: torch.device) -> Tensor:
    return torch.tensor([line[rank] for line in counts], device=device)


def _reversed(counts: Counts) -> Counts:
    return [list(line) for line in zip(*counts)]
