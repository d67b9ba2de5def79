"""Selection of keys pool by pool: consecutive tokens of a sequence that an indexer scores and selects together.

A sequence's first tokens are its first pool, and so on. A token selects the best of the pools that are complete at its
position, and beside them it sees the tokens behind the last complete one, itself included.
Shapes: T new tokens, S sequences, H heads of the indexer, D key width, W what it keeps of a token, P pools.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.ops.select_keys import select_keys

Plan = tuple[Tensor, Tensor, Tensor, Tensor | None, int]
"""query_offsets, kv_offsets, kv_lengths, block_tables and block_size of ``toolkit.ops.attention``."""


class Pools(NamedTuple):
    """How a layer's indexer pools tokens.

    Args:
        size: tokens of a pool.
        selected: pools of a token.
        scale: of the products of queries and keys.
        make: the keys [P, D] of pools [P, size, W]; a pool's depends on its own tokens alone.
    """

    size: int
    selected: int
    scale: float
    make: Callable[[Tensor], Tensor]

    @property
    def width(self) -> int:
        """The most keys that a token sees."""
        return self.selected * self.size + self.size - 1


def select_pools(q: Tensor, rows: Tensor, weights: Tensor, plan: Plan, pools: Pools) -> Tensor:
    """[T, ``pools.width``] positions of the keys that each new token sees, ascending, -1 behind the last one.

    Args:
        q: [T, H, D] queries of the indexer.
        rows: [rows, W] what it keeps of tokens, along sequences as ``plan`` says.
        weights: [T, H] of the heads' scores, as in ``select_keys``.
        plan: of the batch.
        pools: of the layer.
    """
    query_offsets, _, kv_lengths, _, _ = plan
    size, device = pools.size, q.device
    complete = torch.div(kv_lengths, size, rounding_mode="floor")
    first = complete.cumsum(0) - complete
    keys = pools.make(_pooled_rows(rows, complete, first, plan, size))
    row = torch.arange(len(q), device=device)
    sequence = (torch.searchsorted(query_offsets, row, right=True) - 1).clamp(0, len(kv_lengths) - 1)
    position = kv_lengths[sequence] - query_offsets[sequence + 1] + row
    seen = torch.div(position + 1, size, rounding_mode="floor")
    chosen = torch.full((len(q), pools.selected), -1, dtype=torch.int64, device=device)
    if len(keys):
        # A sequence for each token: the pools that are complete there.
        alone = torch.arange(len(q) + 1, device=device)
        begins = first[sequence].clamp(max=len(keys) - 1)
        found = select_keys(
            q.to(keys.dtype), keys, weights, alone, begins, seen.clamp_min(1), topk=pools.selected, scale=pools.scale
        )
        chosen[:, : found.shape[1]] = torch.where(seen[:, None] > 0, found, -1)
    within = torch.arange(size, device=device)
    members = torch.where(chosen[..., None] < 0, -1, chosen[..., None] * size + within).flatten(1)
    tail = seen[:, None] * size + within[:-1]
    tail = torch.where(tail > position[:, None], -1, tail)
    last = torch.iinfo(torch.int64).max
    found = torch.cat([members, tail], 1)
    found = found.masked_fill((found < 0) | (row >= query_offsets[-1])[:, None], last).sort(-1).values
    return found.masked_fill(found == last, -1)


def _pooled_rows(rows: Tensor, complete: Tensor, first: Tensor, plan: Plan, size: int) -> Tensor:
    """[P, size, W] the tokens of every sequence's complete pools, sequence by sequence."""
    _, kv_offsets, _, block_tables, block_size = plan
    sequence = torch.repeat_interleave(torch.arange(len(complete), device=rows.device), complete)
    pool = torch.arange(len(sequence), device=rows.device) - first[sequence]
    position = pool[:, None] * size + torch.arange(size, device=rows.device)
    if block_tables is None:
        return rows[kv_offsets[sequence][:, None] + position]
    block = block_tables[sequence[:, None], torch.div(position, block_size, rounding_mode="floor")]
    return rows[block * block_size + position % block_size]
