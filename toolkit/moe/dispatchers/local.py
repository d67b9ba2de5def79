"""The dispatcher of a rank that has all experts: rows stay where they are."""

from torch import Tensor

from toolkit.ops.dispatch_plan import DispatchPlan, dispatch_plan


class LocalDispatcher:
    """Plans rows for the experts of this rank, which are all there are."""

    size = 1

    def dispatch(self, topk_ids: Tensor, num_local_experts: int) -> DispatchPlan:
        """The plan of topk_ids [T, K]; ``num_local_experts`` marks a pair to skip. No host sync."""
        return dispatch_plan(topk_ids, num_local_experts)
