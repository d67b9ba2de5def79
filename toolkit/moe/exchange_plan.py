"""The plan of an exchange: what goes where, when each transfer begins, and what is computed while it is under way.

T tokens of this rank, K slots a token, W ranks, E experts of which each rank owns E / W in a row, C chunks, which are
runs of tokens.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.moe.transport import Transport
from toolkit.ops.dispatch_plan import DispatchPlan, dispatch_plan

Counts = list[list[int]]
"""[W][W]: how many rows go from each rank to each."""


class Step(NamedTuple):
    """One step of a schedule: "send", "compute" or "receive" a chunk, or "weights", which is of no chunk.

    send: begin to send the chunk's rows to their experts. compute: take what arrived of it, compute, begin to send the
    results back. receive: take the chunk's results. weights: the weights' gradients, of all chunks.
    """

    action: str
    chunk: int = -1


def schedule(chunks: int, backward: bool = False) -> list[Step]:
    """The order of an exchange's steps on every rank.

    A chunk is sent before the one ahead of it is computed, and its results are taken after the next one is: so
    both transfers of a chunk pass while another is computed. In the backward the weights' gradients, which nobody
    waits for, are computed while the last results are under way. ``toolkit.moe.overlap`` predicts its time.
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
    """A chunk's rows on this rank's side.

    tokens: which of this rank's tokens it is. slots: the plan of its slots over ranks in place of experts: rows sorted
    by rank, then by slot. token [U]: the tokens sent, by rank, each once a rank. place [R]: the row of each slot
    among those that its rank gets from here. expert [R]: its place among the experts of its rank.
    row_counts, slot_counts: U and R by rank.
    """

    tokens: slice
    slots: DispatchPlan
    token: Tensor
    place: Tensor
    expert: Tensor
    row_counts: Counts
    slot_counts: Counts

    def packed(self, scores: Tensor) -> Tensor:
        """What is sent of every slot, as bytes [R, 8 + b]: place, expert (int32 each) and its score of b bytes."""
        chosen = scores[self.tokens].reshape(-1)[self.slots.order[: len(self.place)]]
        numbers = torch.stack([self.place, self.expert], 1).to(torch.int32)
        return torch.cat([numbers.view(torch.uint8), chosen[:, None].contiguous().view(torch.uint8)], 1)


def unpacked(slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Place and expert, int64, and score, in ``dtype``, of slots that ``ChunkPlan.packed`` made; [R] each."""
    numbers = slots[:, :8].contiguous().view(torch.int32).long()
    return numbers[:, 0], numbers[:, 1], slots[:, 8:].contiguous().view(dtype)[:, 0]


def plan_exchange(ids: Tensor, num_experts: int, chunks: int, transport: Transport) -> list[ChunkPlan]:
    """The plan of ids [T, K], in which a number outside of 0 to num_experts - 1 marks a slot to skip.

    A token's row goes to a rank once, however many of its experts are there: W (1 - (1 - 1 / W)^K) rows a token on
    average against K, at the price of the 4 bytes that name the row to each slot. What comes back is a row
    a slot, for only the token's owner can add them up in the order of its slots.
    The ranks exchange their counts here, once for all chunks; this is the one time that the host waits for a device.
    """
    size, per_rank = transport.size, num_experts // transport.size
    ranks = torch.where((ids >= 0) & (ids < num_experts), ids // max(per_rank, 1), size)
    ends = [len(ids) * chunk // chunks for chunk in range(chunks + 1)]
    runs = [slice(begin, end) for begin, end in pairwise(ends)]
    plans = [dispatch_plan(ranks[run], size) for run in runs]
    drafts = [_rows_once(plan, ids.shape[1]) for plan in plans]
    mine = torch.stack([torch.stack([sent.diff(), plan.offsets.diff()]) for plan, (_, _, sent) in zip(plans, drafts)])
    every = transport.gather(mine).permute(1, 2, 0, 3).tolist()  # [C][2][from][to]
    result = []
    for run, plan, (token, row, sent), (row_counts, slot_counts) in zip(runs, plans, drafts, every):
        used = sum(slot_counts[transport.rank])
        order, row = plan.order[:used], row[:used]
        expert = ids[run].reshape(-1)[order]
        owner = expert // max(per_rank, 1)
        token = token[: sum(row_counts[transport.rank])]
        result.append(
            ChunkPlan(run, plan, token, row - sent[owner], expert - owner * per_rank, row_counts, slot_counts)
        )
    return result


def _rows_once(plan: DispatchPlan, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a plan over ranks, each token once a rank: (token of each row, row of each slot, where ranks begin)."""
    token = plan.order // max(slots, 1)
    rank = plan.expert_of_rows()
    first = torch.ones_like(token, dtype=torch.bool)
    first[1:] = (token[1:] != token[:-1]) | (rank[1:] != rank[:-1])
    row = first.cumsum(0) - 1
    # All slots of a row write the same token.
    return torch.empty_like(token).scatter_(0, row, token), row, torch.cat([row.new_zeros(1), row + 1])[plan.offsets]


def check_experts(num_experts: int, size: int) -> int:
    """How many experts a rank owns; ToolkitError unless they divide."""
    if num_experts % size:
        raise ToolkitError(
            f"The layer has {num_experts} experts; expert parallelism over {size} ranks needs a multiple."
        )
    return num_experts // size
