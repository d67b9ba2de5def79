"""Attention layers that count positions from a cache's length: in a ragged batch they get each row's own.

Such a layer takes the position of row t as t plus the tokens in the cache (Llama 4 scales queries by it). Rows of a
ragged batch lie one sequence after the other, so ``RowPositions`` stands in for the cache: its length is a tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.state.active import forward_context_of


class RowPositions:
    """A cache that keeps nothing and has, for row t of T, as many tokens as its position exceeds t.

    Args:
        past: [T], or one number for all rows.
    """

    def __init__(self, past: Tensor | int) -> None:
        self.past = past

    @classmethod
    def of(cls, positions: Tensor) -> "RowPositions":
        """For the positions [T] of the rows."""
        return cls(positions - torch.arange(len(positions), device=positions.device))

    def get_seq_length(self, layer_idx: int = 0) -> Tensor | int:
        return self.past

    def get_query_offset(self, layer_idx: int = 0) -> Tensor | int:
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values


def row_positions_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """``own``, the layer's forward, with ``RowPositions`` as its cache in a ragged batch."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context = forward_context_of(kwargs)
        if context is not None:
            kwargs["past_key_values"] = RowPositions.of(context.batch.positions)
        return own(self, *args, **kwargs)

    return forward
