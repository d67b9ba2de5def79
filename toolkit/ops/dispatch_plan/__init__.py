"""The dispatch plan of an MoE layer: which row of the grouped GEMMs belongs to which token and expert."""

from typing import NamedTuple

from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.dispatch_plan import reference
from toolkit.ops.registry import register

__all__ = ["DispatchPlan", "dispatch_plan", "expert_of_rows"]

expert_of_rows = reference.expert_of_rows

TILE = 64
"""Default number of rows per tile."""

_OP = register(
    "dispatch_plan(Tensor topk_ids, int num_experts, int tile) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.dispatch_plan,
    fake=reference.dispatch_plan_fake,
    triton="toolkit.ops.dispatch_plan.triton.dispatch_plan",
)


class DispatchPlan(NamedTuple):
    """Rows sorted by expert, for T tokens, K experts per token and E experts; R = T K rows, all tensors int64.

    The forward's two grouped GEMMs and the backward's four read the same plan.

    Fields:
        order: [R], the pair t * K + k of each row, by expert, then by pair; skipped pairs last, by pair.
        rows: [T, K], the row of each (token, k) pair, -1 for a skipped pair.
        offsets: [E + 1], expert e owns rows offsets[e] to offsets[e + 1]; rows from offsets[E] on are not computed.
        tiles: [R // tile + min(E, R), 2], (expert, first row) of every tile in row order, padded with (E, offsets[E]).
            Their number depends on shapes alone, so no host sync is needed.
    """

    order: Tensor
    rows: Tensor
    offsets: Tensor
    tiles: Tensor

    def expert_of_rows(self) -> Tensor:
        """[R] the expert of each row; E for rows of skipped pairs."""
        return expert_of_rows(self.order, self.offsets)


def dispatch_plan(topk_ids: Tensor, num_experts: int, tile: int = TILE, *, impl: str | None = None) -> DispatchPlan:
    """The ``DispatchPlan`` of a routing.

    Args:
        topk_ids: [T, K], any integer dtype. The expert of each (token, k) pair, 0 to E - 1; any other number, by
            convention E, skips the pair.
        num_experts: E.
        tile: rows per tile of the grouped GEMMs.

    Raises:
        ToolkitError: for another shape or dtype, or a tile below 1.

    Numerics: integers only, equal in every implementation. No gradient.
    """
    if topk_ids.dim() != 2 or topk_ids.is_floating_point() or num_experts < 0 or tile < 1:
        raise ToolkitError(
            f"dispatch_plan needs integer topk_ids [T, K], num_experts >= 0 and tile >= 1, got {topk_ids.dtype} "
            f"{list(topk_ids.shape)}, {num_experts} and {tile}."
        )
    return DispatchPlan(*_OP.select(impl)(topk_ids.long(), num_experts, tile))
