"""MoE layers that select experts themselves, of logits that their router returns (DBRX)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.modules.router import Router


@dataclass(frozen=True)
class RoutingLayer:
    """The names of a layer's parts, and how it routes.

    Args:
        router: a module of hidden states to logits [T, E], which may change the hidden states in place. It is called as
            it is.
        experts: a module of hidden states, ids and weights [T, K].
        routing: settings of the selection; those of the matrix are not read.
        norm: 2 divides a token's weights by the root of the sum of their squares; None does not.
    """

    router: str
    experts: str
    routing: Router
    norm: int | None = None

    def make_forward(self) -> Callable[..., Tensor]:
        """The layer's: of hidden states [..., H] to what its experts return. Scores are float32 or wider."""
        parts = self

        def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
            logits: Tensor = getattr(self, parts.router)(hidden_states)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            weights, ids = parts.routing.select(logits, None)
            if parts.norm is not None:
                # Column by column: a sum whose order does not depend on the number of tokens.
                weights = weights / reduce(torch.add, weights.square().unbind(-1)).sqrt()[:, None]
            experts: Any = getattr(self, parts.experts)
            out: Tensor = experts(hidden_states, ids, weights.to(hidden_states.dtype))
            return out

        return forward
