"""The plan of an exchange: what goes where, when each transfer starts, and what is computed meanwhile.

T tokens of this rank, K experts per token, W ranks, E experts of which each rank owns E / W consecutive ones, C chunks,
which are runs of tokens.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.moe.dispatchers.transport import Transport
from toolkit.ops.dispatch_plan import DispatchPlan, dispatch_plan

Counts = list[list[int]]
"""[W][W]: how many rows go from each rank (first index) to each."""


class Step(NamedTuple):
    """One step of a schedule.

    Fields:
        action: "send" starts to send the chunk's rows to their experts; "compute" waits for the rows that came,
            computes, and starts to send the results back; "receive" waits for the chunk's results; "weights" computes
            the weights' gradients of all chunks.
        chunk: the index of the chunk; -1 for "weights".
    """

    action: str
    chunk: int = -1


def schedule(chunks: int, backward: bool = False) -> list[Step]:
    """The order of an exchange's steps on every rank.

    A chunk is sent before the previous one is computed, and its results are received after the next one is computed, so
    both transfers of a chunk overlap the GEMMs of another. In the backward the weights' gradients, which no rank waits
    for, are computed during the last transfer. ``benchmarks.end_to_end.moe_overlap_model`` predicts its time.
    """
    steps = [Step("send", 0)]
    for chunk in range(chunks):
        if chunk + 1 < chunks:
            steps.append(Step("send", chunk + 1))
        steps.append(Step("compute", chunk))
        if chunk:
            steps.append(Step("receive", chunk - 1))
    return [*steps, *[Step("weights")] * backward, Step("receive", chunks - 1)]


class ChunkPlan(NamedTuple):
    """The rows of one chunk that this rank sends.

    Fields:
        tokens: this rank's tokens in the chunk.
        pairs: the plan of its (token, k) pairs over ranks instead of experts: rows sorted by rank, then by pair.
        token: [U], the tokens sent, by rank, each once per rank.
        row: [R], the index of each pair's row among those that its rank gets from here.
        expert: [R], the index of each pair's expert on its rank.
        row_counts: U by rank.
        pair_counts: R by rank.
    """

    tokens: slice
    pairs: DispatchPlan
    token: Tensor
    row: Tensor
    expert: Tensor
    row_counts: Counts
    pair_counts: Counts

    def packed(self, topk_weights: Tensor) -> Tensor:
        """[R, 8 + b] bytes, what is sent of every pair: row and expert (int32 each) and its weight of b bytes."""
        selected = topk_weights[self.tokens].reshape(-1)[self.pairs.order[: len(self.row)]]
        numbers = torch.stack([self.row, self.expert], 1).to(torch.int32)
        return torch.cat([numbers.view(torch.uint8), selected[:, None].contiguous().view(torch.uint8)], 1)


def unpack_pairs(pairs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(row, expert, topk_weights) [R] of what ``ChunkPlan.packed`` made: int64, int64 and ``dtype``."""
    numbers = pairs[:, :8].contiguous().view(torch.int32).long()
    return numbers[:, 0], numbers[:, 1], pairs[:, 8:].contiguous().view(dtype)[:, 0]


def plan_exchange(topk_ids: Tensor, num_experts: int, chunks: int, transport: Transport) -> list[ChunkPlan]:
    """The plan of topk_ids [T, K], in which a number outside of 0 to num_experts - 1 marks a pair to skip.

    A token's row goes to a rank once, however many of its experts are there: W (1 - (1 - 1 / W)^K) rows per token on
    average instead of K, plus the 4 bytes per pair that name the row. One row per pair comes back, because only the
    token's owner can add them in order of k. The ranks exchange their counts here, once for all chunks; this is the
    only host sync.
    """
    size, per_rank = transport.size, num_experts // transport.size
    ranks = torch.where((topk_ids >= 0) & (topk_ids < num_experts), topk_ids // max(per_rank, 1), size)
    ends = [len(topk_ids) * chunk // chunks for chunk in range(chunks + 1)]
    runs = [slice(begin, end) for begin, end in pairwise(ends)]
    plans = [dispatch_plan(ranks[run], size) for run in runs]
    drafts = [_rows_once(plan, topk_ids.shape[1]) for plan in plans]
    mine = torch.stack([torch.stack([sent.diff(), plan.offsets.diff()]) for plan, (_, _, sent) in zip(plans, drafts)])
    every = transport.gather(mine).permute(1, 2, 0, 3).tolist()  # [C][2][from][to]
    result = []
    for run, plan, (token, row, sent), (row_counts, pair_counts) in zip(runs, plans, drafts, every):
        used = sum(pair_counts[transport.rank])
        order, row = plan.order[:used], row[:used]
        expert = topk_ids[run].reshape(-1)[order]
        owner = expert // max(per_rank, 1)
        token = token[: sum(row_counts[transport.rank])]
        result.append(
            ChunkPlan(run, plan, token, row - sent[owner], expert - owner * per_rank, row_counts, pair_counts)
        )
    return result


def _rows_once(plan: DispatchPlan, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a plan over ranks, each token once per rank: (token of each row, row of each pair, where ranks begin)."""
    token = plan.order // max(top_k, 1)
    rank = plan.expert_of_rows()
    first = torch.ones_like(token, dtype=torch.bool)
    first[1:] = (token[1:] != token[:-1]) | (rank[1:] != rank[:-1])
    row = first.cumsum(0) - 1
    # All pairs of a row write the same token.
    return torch.empty_like(token).scatter_(0, row, token), row, torch.cat([row.new_zeros(1), row + 1])[plan.offsets]


def experts_per_rank(num_experts: int, size: int) -> int:
    """E / W; ToolkitError unless W divides E."""
    if num_experts % size:
        raise ToolkitError(
            f"The number of experts must be a multiple of the {size} ranks of expert parallelism, got {num_experts}."
        )
    return num_experts // size
