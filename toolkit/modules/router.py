"""Routers of mixtures of experts: scores in float32 at least, the same bits for a token in any batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.ops.linear import linear
from toolkit.ops.route import route
from toolkit.state.batch import RaggedBatch


@dataclass(frozen=True)
class Router:
    """What a router computes: fields of ``toolkit.ops.route.route``, and the attributes that hold its parameters.

    layer: its place among the model's layers of experts. correction: the attribute of the choice's bias.
    outputs: what its forward returns, in order, of "logits", "weights" and "ids".
    """

    k: int
    score: str = "softmax"
    weight: str = "weight"
    bias: str | None = None
    correction: str | None = None
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 1
    normalise: bool = False
    eps: float = 0.0
    scale: float = 1.0
    outputs: tuple[str, ...] = ("logits", "weights", "ids")
    layer: int = 0

    def forward(self) -> Callable[..., Any]:
        """A forward of hidden states [..., H] that returns ``outputs`` of [T, E], [T, K] and [T, K]."""
        settings = self

        def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            weight: Any = getattr(self, settings.weight)
            x = hidden_states.reshape(-1, weight.shape[1])
            wide = torch.promote_types(x.dtype, torch.float32)
            bias: Any = None if settings.bias is None else getattr(self, settings.bias)
            logits = linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
            batch = RaggedBatch.active()
            correction: Any = None if settings.correction is None else getattr(self, settings.correction)
            weights, ids = route(
                logits,
                settings.k,
                settings.score,
                bias=correction,
                chosen=None if batch is None else batch.replayed(settings.layer, len(weight)),
                groups=settings.groups,
                kept_groups=settings.kept_groups,
                group_best=settings.group_best,
                normalise=settings.normalise,
                eps=settings.eps,
                scale=settings.scale,
            )
            if batch is not None:
                batch.note_scores(settings.layer, logits, ids, correction)
            found = {"logits": logits.to(x.dtype), "weights": weights.to(x.dtype), "ids": ids}
            values = tuple(found[name] for name in settings.outputs)
            return values if len(values) > 1 else values[0]

        return forward
