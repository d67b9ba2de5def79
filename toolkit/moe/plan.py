"""The dispatch plan: which row of the experts' products belongs to which token, made once a layer and read by all."""

from typing import NamedTuple

from torch import Tensor

from toolkit.ops.dispatch_plan import TILE, dispatch_plan, expert_of_rows


class DispatchPlan(NamedTuple):
    """The four tensors of ``toolkit.ops.dispatch_plan``, int64, for T tokens of K slots and E experts; R = T K.

    order [R]: the slot t * K + k of each row, by expert, then by slot; skipped slots last.
    rows [T, K]: the row of each slot, -1 for a skipped one.
    offsets [E + 1]: where the rows of each expert begin and end.
    tiles [B, 2]: expert and first row of every tile of rows.

    The forward's two products and the backward's four read the same plan.
    """

    order: Tensor
    rows: Tensor
    offsets: Tensor
    tiles: Tensor

    def expert_of_rows(self) -> Tensor:
        """[R] the expert of each row; E for rows of skipped slots."""
        return expert_of_rows(self.order, self.offsets)

    @classmethod
    def of(cls, ids: Tensor, num_experts: int, tile: int = TILE) -> "DispatchPlan":
        """The plan of a routing: ids [T, K], num_experts for a slot to skip. Nothing waits for the device."""
        return cls(*dispatch_plan(ids, num_experts, tile))
