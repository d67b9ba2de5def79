"""Tables of positions whose module counts them from a token's place in its row: in a ragged batch from the sequence's.

Such a module is handed tokens, or their shape, and how many came before (``past_key_values_length``).
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.state.active import forward_context_of
from toolkit.state.batch import RaggedBatch

PAST = "past_key_values_length"
GIVEN = "position_ids"


def by_argument(own: Callable[..., Any], axes: int) -> Callable[..., Any]:
    """``own``, the module's forward, with the batch's positions as ``position_ids``, [T] or for 2 axes [1, T]."""
    signature = inspect.signature(own)

    def rows(module: nn.Module, batch: RaggedBatch, args: Any, kwargs: Any) -> Any:
        arguments = signature.bind(module, *args, **kwargs).arguments
        arguments[GIVEN] = batch.positions[None] if axes == 2 else batch.positions
        return own(**arguments)

    return _in_batches(own, rows)


def by_table(own: Callable[..., Any], table: str, offset: int, axes: int) -> Callable[..., Any]:
    """Rows [T, D] of the tensor ``table`` at each position plus ``offset``, or for 3 axes [1, T, D]."""

    def rows(module: nn.Module, batch: RaggedBatch, args: Any, kwargs: Any) -> Tensor:
        found = F.embedding(batch.positions + offset, getattr(module, table))
        return found[None] if axes == 3 else found

    return _in_batches(own, rows)


def _in_batches(own: Callable[..., Any], rows: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context = forward_context_of(kwargs)
        return own(self, *args, **kwargs) if context is None else rows(self, context.batch, args, kwargs)

    return forward
