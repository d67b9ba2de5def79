"""The dispatch plan in plain torch: the specification."""

import torch
from torch import Tensor


def tile_bound(pairs: int, num_experts: int, tile: int) -> int:
    """The largest number of tiles: every full one, and a partial one for each expert with rows."""
    return pairs // tile + min(num_experts, pairs)


def dispatch_plan(topk_ids: Tensor, num_experts: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(order [R], rows [T, K], offsets [E + 1], tiles [B, 2]): see ``toolkit.ops.dispatch_plan.DispatchPlan``."""
    ids = topk_ids.reshape(-1)
    known = torch.arange(num_experts, device=ids.device)
    kept = (ids >= 0) & (ids < num_experts)
    ids = torch.where(kept, ids, num_experts)
    order = torch.sort(ids, stable=True).indices
    counts = (ids[:, None] == known).sum(0)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order), device=ids.device)
    rows = torch.where(kept, rows, -1).view(topk_ids.shape)
    ends = (-(-counts // tile)).cumsum(0)  # of the tiles of each expert
    index = torch.arange(tile_bound(len(order), num_experts, tile), device=ids.device)
    owner = torch.searchsorted(ends, index, right=True)
    begins = torch.cat([ends - -(-counts // tile), ends[-1:] if num_experts else ends.new_zeros(1)])
    first = offsets[owner] + torch.where(owner < num_experts, index - begins[owner], 0) * tile
    return order, rows, offsets, torch.stack([owner, first], 1)


def expert_of_rows(order: Tensor, offsets: Tensor) -> Tensor:
    """[R] the expert of each row of a plan; E for rows of skipped pairs."""
    return torch.searchsorted(offsets[1:].contiguous(), torch.arange(len(order), device=order.device), right=True)


def dispatch_plan_fake(topk_ids: Tensor, num_experts: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = topk_ids.numel()

    def like(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=topk_ids.device)

    rows = torch.empty(topk_ids.shape, dtype=torch.int64, device=topk_ids.device)
    return like(pairs), rows, like(num_experts + 1), like(tile_bound(pairs, num_experts, tile), 2)
