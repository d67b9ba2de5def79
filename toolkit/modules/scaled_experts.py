"""MoE layers that hand every expert all tokens, scaled by scores that are 0 for all but the selected (Llama 4).

Shapes: T tokens, E experts, K selected per token, H width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.moe.observer import observe_router
from toolkit.ops.linear import linear
from toolkit.ops.route import route
from toolkit.ops.route.reference import stable_topk
from toolkit.state.active import get_forward_context


@dataclass(frozen=True)
class ScaledExperts:
    """The names of a layer's parts.

    Args:
        router: whose weight [E, H] makes the logits; the selected have the highest, and their sigmoids are the scores.
        experts: a module with the forward of ``MoeExperts``, whose layout applies the scores at the input.
        shared: modules that every token goes through, whose outputs are added.
        top_k: K.
        layer: the index among the model's MoE layers, under which routing is recorded and replayed.
    """

    router: str
    experts: str
    shared: tuple[str, ...]
    top_k: int
    layer: int = 0

    def router_forward(self) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The router's: scores and logits [T, E] as its class returns them, and scores and experts [T, K].

        Logits are computed in float32 or wider.
        """
        parts = self

        def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            x = hidden_states
            dtype = torch.promote_types(x.dtype, torch.float32)
            logits = linear(x.to(dtype), self.weight.to(dtype), None)
            context = get_forward_context()
            replay = None if context is None else context.replay
            ids = None if replay is None else replay.take(parts.layer, logits.shape[1])
            # By logits and not by scores: sigmoids of large ones are all 1.
            ids = stable_topk(logits.detach(), parts.top_k) if ids is None else ids
            selected, ids = route(logits, parts.top_k, "sigmoid", topk_ids=ids)
            if context is not None:
                observe_router(parts.layer, logits, ids, context.batch.multiplicity, None)
            selected = selected.to(x.dtype)
            scores = torch.zeros(logits.shape, dtype=x.dtype, device=x.device).scatter(1, ids, selected)
            return scores, logits.to(x.dtype), selected, ids

        return forward

    def make_forward(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The layer's: of hidden states [..., H] to outputs [T, H] and logits [T, E]."""
        parts = self

        def forward(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            x = hidden_states.reshape(-1, hidden_states.shape[-1])
            _, logits, selected, ids = getattr(self, parts.router)(x)
            out: Tensor = getattr(self, parts.experts)(x, ids, selected)
            for name in parts.shared:
                beside = getattr(self, name)(x)
                out = beside + out.to(beside.dtype)
            return out, logits

        return forward
