"""Expert parallelism: experts sharded over ranks, token rows exchanged in chunks.

T tokens of this rank, K experts per token, W ranks, E experts in all, hidden size H.
"""

from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.moe.dispatchers.exchange_plan import ChunkPlan, Counts, experts_per_rank, plan_exchange, unpack_pairs
from toolkit.moe.dispatchers.transport import Pending, Transport, transport_of
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.experts.rows import RoutedRows


class Exchange:
    """One layer's rows on their way between ranks, chunk by chunk.

    Args:
        transport: carries the rows.
        chunks: the plan of each chunk of this rank's tokens.
        num_local_experts: experts of each rank.
    """

    def __init__(self, transport: Transport, chunks: list[ChunkPlan], num_local_experts: int) -> None:
        self.transport, self.chunks, self.num_local_experts = transport, chunks, num_local_experts

    def send_pairs(self, chunk: ChunkPlan, topk_weights: Tensor) -> Pending:
        """Starts to send each (token, k) pair's row index, expert and routing weight to the rank of its expert."""
        return self.transport.exchange(chunk.packed(topk_weights), chunk.pair_counts)

    def send_rows(self, chunk: ChunkPlan, x: Tensor) -> Pending:
        """Starts to send each token's row of x [T, H] to the ranks of its experts, once per rank."""
        return self.transport.exchange(x[chunk.tokens][chunk.token], chunk.row_counts)

    def receive(
        self, chunk: ChunkPlan, pairs: Tensor, arrived: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, RoutedRows]:
        """(index into ``arrived`` [N], the N rows) of the pairs that came to this rank.

        Args:
            pairs, arrived: what ``send_pairs`` and ``send_rows`` brought.
            dtype: of the routing weights.
        """
        index, expert, topk_weights = unpack_pairs(pairs, dtype)
        begins = [0, *accumulate(line[self.transport.rank] for line in chunk.row_counts)][:-1]
        per_rank = self.received(chunk.pair_counts, index.device)
        row = index + torch.tensor(begins, device=index.device).repeat_interleave(per_rank)
        plan = dispatch_plan(expert[:, None], self.num_local_experts)
        return row, RoutedRows(arrived[row], expert, topk_weights, plan)

    def send_back(self, chunk: ChunkPlan, values: Tensor) -> Pending:
        """Starts to send one row per pair back to the ranks of their tokens."""
        return self.transport.exchange(values, [list(line) for line in zip(*chunk.pair_counts)])

    def received(self, counts: Counts, device: torch.device) -> Tensor:
        """[W] how many rows came to this rank from each."""
        return torch.tensor([line[self.transport.rank] for line in counts], device=device)


class ExpertParallelDispatcher:
    """Experts sharded over a group: rank r of W owns experts r E / W to (r + 1) E / W.

    Args:
        group: of ``torch.distributed`` (gloo or NCCL), best one that nothing else uses, because all its ranks must make
            the same calls in the same order; None is one rank alone.
        chunks: runs of tokens, each of whose transfers overlap the GEMMs of the others. Equal on all ranks.
        transport: replaces the group.

    Raises:
        ToolkitError: for chunks below 1.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, chunks: int = 2, transport: Transport | None = None
    ) -> None:
        if chunks < 1:
            raise ToolkitError(f"chunks must be >= 1, got {chunks}.")
        self.transport = transport if transport is not None else transport_of(group)
        self.chunks = chunks

    @property
    def size(self) -> int:
        """W."""
        return self.transport.size

    def owned(self, num_experts: int) -> slice:
        """The experts of this rank. ToolkitError unless the ranks divide them."""
        count = experts_per_rank(num_experts, self.size)
        return slice(self.transport.rank * count, (self.transport.rank + 1) * count)

    def dispatch(self, topk_ids: Tensor, num_local_experts: int) -> Exchange:
        """The exchange of topk_ids [T, K], ids of all E experts; E marks a pair to skip.

        All ranks of the group must call it. The host waits for the device here, once, for the counts of rows.
        """
        chunks = plan_exchange(topk_ids, num_local_experts * self.size, self.chunks, self.transport)
        return Exchange(self.transport, chunks, num_local_experts)
