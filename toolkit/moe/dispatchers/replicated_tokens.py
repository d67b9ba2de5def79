"""Experts sharded over ranks that all have the same tokens (tensor parallel)."""

import torch.distributed as dist
from torch import Tensor

from toolkit.moe.dispatchers.expert_parallel import Exchange, ExpertParallelDispatcher


class ReplicatedTokensDispatcher:
    """Every rank dispatches its share of the tokens, and ``moe_forward`` gathers what came of all.

    So each token is computed once, and outputs, and the gradients of tokens, are those of one process.

    Args:
        ranks: the group, all of whose ranks hold equal tokens.
        chunks: of ``ExpertParallelDispatcher``.
    """

    def __init__(self, ranks: dist.ProcessGroup, chunks: int = 1) -> None:
        self.of_shares = ExpertParallelDispatcher(ranks, chunks)
        self.group: str = ranks.group_name

    @property
    def size(self) -> int:
        return self.of_shares.size

    def owned(self, num_experts: int) -> slice:
        """The experts of this rank. ToolkitError unless the ranks divide them."""
        return self.of_shares.owned(num_experts)

    def dispatch(self, topk_ids: Tensor, num_local_experts: int) -> Exchange:
        """The exchange of the ids of this rank's share of the tokens."""
        return self.of_shares.dispatch(topk_ids, num_local_experts)
