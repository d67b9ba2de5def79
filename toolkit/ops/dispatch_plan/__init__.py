"""Which row of a mixture of experts' products belongs to which token and expert, fixed before the products."""

from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.dispatch_plan import reference
from toolkit.ops.registry import register

__all__ = ["dispatch_plan", "expert_of_rows"]

expert_of_rows = reference.expert_of_rows

TILE = 64
"""Rows of a tile where none is asked for."""

_OP = register(
    "dispatch_plan(Tensor experts, int num_experts, int tile) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.dispatch_plan,
    fake=reference.dispatch_plan_fake,
    triton="toolkit.ops.dispatch_plan.triton.dispatch_plan",
)


def dispatch_plan(
    experts: Tensor, num_experts: int, tile: int = TILE, *, impl: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows sorted by expert, for T tokens of K slots each and E experts. A slot is t * K + k; all tensors int64.

    experts [T, K]: the expert of each slot, 0 to E - 1; any other number, by custom E, marks a slot that is skipped.
    tile: rows that a product takes together.
    Returns, with R = T K,
    order [R]: the slot of each row, by expert and then by slot; skipped slots come last, by slot;
    rows [T, K]: the row of each slot, -1 for one that is skipped;
    offsets [E + 1]: rows of expert e are offsets[e] to offsets[e + 1]; from offsets[E] on nothing is computed;
    tiles [R // tile + min(E, R), 2]: (expert, first row) of every tile in the order of the rows, then (E, offsets[E])
    for those that there are not. Their number is known without looking at the routing, so nothing waits for a device.

    Integers only: equal to the bit in every implementation. No gradient.
    Raises ToolkitError for another shape or dtype, or a tile below 1.
    """
    if experts.dim() != 2 or experts.is_floating_point() or num_experts < 0 or tile < 1:
        raise ToolkitError(
            f"dispatch_plan got experts {list(experts.shape)} of {experts.dtype}, num_experts {num_experts} and tile "
            f"{tile}; allowed are integers [T, K], 0 or more experts and a tile of 1 or more."
        )
    return _OP.select(impl)(experts.long(), num_experts, tile)
