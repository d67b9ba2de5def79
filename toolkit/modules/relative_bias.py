"""Attention layers with a bias of each query by distance, which a module of theirs makes (Inkling).

In a ragged batch the module hands on the biases by distance, which the context attends by, and a stand-in for the cache
says where each row is in its sequence.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from toolkit.modules.row_positions import RowPositions
from toolkit.state.active import forward_context_of, get_forward_context, set_forward_context

CACHE = "past_key_values"


def relative_logits_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """``own``, which makes a bias of every key: in a ragged batch [B, H, T, R], by distance."""

    def forward(self: Any, relative_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if get_forward_context() is None:
            return own(self, relative_states, *args, **kwargs)
        return (relative_states @ self.proj).transpose(1, 2)

    return forward


def biased_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """``own``, a layer's forward, with the rows' positions as its cache in a ragged batch."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context = forward_context_of(kwargs)
        if context is None:
            return own(self, *args, **kwargs)
        kwargs[CACHE] = RowPositions.of(context.batch.positions)
        with set_forward_context(context):  # the module is not handed the keyword
            return own(self, *args, **kwargs)

    return forward
