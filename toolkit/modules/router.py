"""Routers of mixtures of experts: scores in float32 at least, the same bits for a token in any batch."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.ops.linear import linear
from toolkit.ops.route import route
from toolkit.state.batch import RaggedBatch


@dataclass(frozen=True)
class Router:
    """What a router computes: fields of ``toolkit.ops.route.route``, and the attributes that hold its parameters.

    layer: its place among the model's layers of experts. projection: a linear child that makes the logits, called as a
    module so that adapters act, in the place of weight and bias. correction: the (dotted) attribute of the choice's
    bias; "" where it is the forward's second argument. outputs: what its forward returns, in order, of "logits",
    "weights" and "ids"; wide: those of them that are not rounded to the hidden states' dtype.
    """

    k: int
    score: str = "softmax"
    weight: str = "weight"
    bias: str | None = None
    projection: str | None = None
    correction: str | None = None
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 1
    normalise: bool = False
    eps: float = 0.0
    scale: float = 1.0
    outputs: tuple[str, ...] = ("logits", "weights", "ids")
    wide: tuple[str, ...] = ()
    layer: int = 0

    def logits(self, module: nn.Module, x: Tensor) -> Tensor:
        """[T, E] of hidden states [T, H]."""
        if self.projection is not None:
            child: Any = getattr(module, self.projection)
            logits = child(x.to(next(child.parameters()).dtype))
            return logits.to(torch.promote_types(logits.dtype, torch.float32))
        weight: Any = getattr(module, self.weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        bias: Any = None if self.bias is None else getattr(module, self.bias)
        return linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))

    def choose(self, logits: Tensor, correction: Tensor | None, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and ids [T, K] of logits [T, E]."""
        return route(
            logits,
            self.k,
            self.score,
            bias=None if correction is None else correction.detach().reshape(-1),
            chosen=chosen,
            groups=self.groups,
            kept_groups=self.kept_groups,
            group_best=self.group_best,
            normalise=self.normalise,
            eps=self.eps,
            scale=self.scale,
        )

    def make_forward(self) -> Callable[..., Any]:
        """A forward of hidden states [..., H] that returns ``outputs`` of [T, E], [T, K] and [T, K]."""
        settings = self
        find = attrgetter(self.correction) if self.correction else None

        def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            x = hidden_states.reshape(-1, hidden_states.shape[-1])
            logits = settings.logits(self, x)
            correction: Any = None if find is None else find(self)
            if settings.correction == "":
                correction = next(iter((*args, *kwargs.values())), None)
            batch = RaggedBatch.active()
            chosen = None if batch is None else batch.replayed(settings.layer, logits.shape[1])
            weights, ids = settings.choose(logits, correction, chosen)
            if batch is not None:
                batch.note_scores(settings.layer, logits, ids, correction)
            found = {"logits": logits, "weights": weights, "ids": ids}
            for name in ("logits", "weights"):
                found[name] = found[name] if name in settings.wide else found[name].to(x.dtype)
            values = tuple(found[name] for name in settings.outputs)
            return values if len(values) > 1 else values[0]

        return forward
