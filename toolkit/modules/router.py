"""Routers of MoE layers: logits in float32 or wider, batch-invariant."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.moe.observer import observe_router
from toolkit.ops.activation import activation
from toolkit.ops.linear import linear
from toolkit.ops.route import route
from toolkit.state.active import get_forward_context


@dataclass(frozen=True)
class Router:
    """A router's settings, and the names of the attributes that hold its parameters.

    Args:
        top_k, scoring_func, n_group, topk_group, experts_per_group_score, norm_topk_prob, eps, routed_scaling_factor:
            of ``toolkit.ops.route.route``.
        weight: the attribute of the weight [E, H].
        bias: the attribute of the logits' bias [E], or None.
        projection: the name of a linear child that makes the logits, in place of weight and bias. It is called as a
            module, so that adapters apply.
        expert_bias: the (dotted) attribute of the bias of the selection; "" where it is the forward's second argument;
            None for none.
        prelude: what the matrix is applied to is made of hidden states by the module of this name, its class's code
            (Gemma 4: a norm), times the vector ``input_scale`` [H] and the number ``input_factor``, attributes too;
            None for the hidden states themselves.
        expert_scale: the attribute of a vector [E] that multiplies each expert's weight, or None.
        outputs: what the forward returns, in order, of "logits", "scores" (of all experts, float32), "topk_weights" and
            "topk_ids".
        float32_outputs: those of ``outputs`` that are not cast to the hidden states' dtype.
        layer: the index among the model's MoE layers, under which routing is recorded and replayed.
    """

    top_k: int
    scoring_func: str = "softmax"
    weight: str = "weight"
    bias: str | None = None
    projection: str | None = None
    expert_bias: str | None = None
    n_group: int = 1
    topk_group: int = 1
    experts_per_group_score: int = 1
    norm_topk_prob: bool = False
    eps: float = 0.0
    routed_scaling_factor: float = 1.0
    prelude: str | None = None
    input_scale: str | None = None
    input_factor: str | None = None
    expert_scale: str | None = None
    outputs: tuple[str, ...] = ("logits", "topk_weights", "topk_ids")
    float32_outputs: tuple[str, ...] = ()
    layer: int = 0

    def projected(self, module: Any, x: Tensor) -> Tensor:
        """What the matrix is applied to, of hidden states [T, H]."""
        if self.prelude is None:
            return x
        x = getattr(module, self.prelude)(x)
        x = x if self.input_scale is None else x * getattr(module, self.input_scale)
        return x if self.input_factor is None else x * getattr(module, self.input_factor)

    def logits(self, module: nn.Module, x: Tensor) -> Tensor:
        """[T, E] of hidden states [T, H], in float32 or wider."""
        x = self.projected(module, x)
        if self.projection is not None:
            child: Any = getattr(module, self.projection)
            logits: Tensor = child(x.to(next(child.parameters()).dtype))
            return logits.to(torch.promote_types(logits.dtype, torch.float32))
        weight: Any = getattr(module, self.weight)
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias: Any = None if self.bias is None else getattr(module, self.bias)
        return linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    def route(
        self, logits: Tensor, expert_bias: Tensor | None, topk_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(topk_weights, topk_ids) [T, K] of logits [T, E]; ``topk_ids``, if given, replaces the selection."""
        return route(
            logits,
            self.top_k,
            self.scoring_func,
            expert_bias=None if expert_bias is None else expert_bias.detach().reshape(-1),
            topk_ids=topk_ids,
            n_group=self.n_group,
            topk_group=self.topk_group,
            experts_per_group_score=self.experts_per_group_score,
            norm_topk_prob=self.norm_topk_prob,
            eps=self.eps,
            routed_scaling_factor=self.routed_scaling_factor,
        )

    def select(self, logits: Tensor, expert_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """``route``, by the routing that the forward context replays, if it does; it is shown to the observer."""
        context = get_forward_context()
        replay = None if context is None else context.replay
        replayed = None if replay is None else replay.take(self.layer, logits.shape[1])
        topk_weights, topk_ids = self.route(logits, expert_bias, replayed)
        if context is not None:
            observe_router(self.layer, logits, topk_ids, context.batch.multiplicity, expert_bias)
        return topk_weights, topk_ids

    def scores(self, logits: Tensor) -> Tensor:
        """[T, E] of logits: what experts are selected by, for whoever reads the module's outputs."""
        return logits.softmax(-1) if self.scoring_func == "softmax" else activation(logits, self.scoring_func)

    def make_forward(self) -> Callable[..., Any]:
        """A forward of hidden states [..., H] that returns ``outputs`` of [T, E], [T, K] and [T, K]."""
        settings = self
        find = attrgetter(self.expert_bias) if self.expert_bias else None

        def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            x = hidden_states.reshape(-1, hidden_states.shape[-1])
            logits = settings.logits(self, x)
            expert_bias: Any = None if find is None else find(self)
            if settings.expert_bias == "":
                expert_bias = next(iter((*args, *kwargs.values())), None)
            topk_weights, topk_ids = settings.select(logits, expert_bias)
            if settings.expert_scale is not None:
                topk_weights = topk_weights * getattr(self, settings.expert_scale)[topk_ids]
            found = {"logits": logits, "topk_weights": topk_weights, "topk_ids": topk_ids}
            if "scores" in settings.outputs:
                found["scores"] = settings.scores(logits)
            for name in ("logits", "topk_weights"):
                found[name] = found[name] if name in settings.float32_outputs else found[name].to(x.dtype)
            values = tuple(found[name] for name in settings.outputs)
            return values if len(values) > 1 else values[0]

        return forward
