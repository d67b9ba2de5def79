"""Dispatchers: how the rows of a layer's tokens reach the experts, on this rank or on others."""

from typing import Protocol

from torch import Tensor

from toolkit.moe.dispatchers.expert_parallel import Exchange, ExpertParallelDispatcher
from toolkit.moe.dispatchers.local import LocalDispatcher
from toolkit.moe.dispatchers.replicated_tokens import ReplicatedTokensDispatcher
from toolkit.ops.dispatch_plan import DispatchPlan

__all__ = [
    "LOCAL",
    "Dispatcher",
    "Exchange",
    "ExpertParallelDispatcher",
    "LocalDispatcher",
    "ReplicatedTokensDispatcher",
]


class Dispatcher(Protocol):
    """Plans where the rows of a layer's tokens go."""

    @property
    def size(self) -> int:
        """The number of ranks that the experts are sharded over."""

    def dispatch(self, topk_ids: Tensor, num_local_experts: int) -> DispatchPlan | Exchange:
        """Where the rows of topk_ids [T, K] go.

        A ``DispatchPlan`` where this rank has all experts, whose kernels gather the rows in place; an ``Exchange``
        where rows travel between ranks.
        """


LOCAL = LocalDispatcher()
"""The dispatcher of a rank that has all experts."""
