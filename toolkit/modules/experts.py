"""Experts of a mixture as a module keeps them: which parameters they are, and how they lie."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.moe import ExpertAdapters, ExpertWeights, mix
from toolkit.moe.sharding import ATTRIBUTE
from toolkit.state.active import get_forward_context


@dataclass(frozen=True)
class Experts:
    """Where a module keeps the parameters of its experts, by attribute name, and their layout.

    layer: its place among the model's layers of experts, by which routing is recorded and replayed.
    A module whose attribute ``recompute_experts`` is true keeps no activations of rows for the backward.
    post: a norm of every expert's output. The other fields are those of ``toolkit.ops.experts.experts``.
    """

    up: str
    down: str
    kind: str
    up_bias: str | None = None
    down_bias: str | None = None
    site: str = "activation"
    transposed: bool = False
    interleaved: bool = False
    post: str | None = None
    layer: int = 0

    def weights(self, module: nn.Module) -> ExpertWeights:
        """The parameters as they are now."""
        up_bias, down_bias = (
            None if name is None else getattr(module, name) for name in (self.up_bias, self.down_bias)
        )
        return ExpertWeights(
            getattr(module, self.up), getattr(module, self.down), self.kind, up_bias, down_bias, self.site,
            self.transposed, self.interleaved, getattr(module, ATTRIBUTE, None),
        )  # fmt: skip

    def names(self) -> list[str]:
        """The parameters with a row an expert."""
        return [name for name in (self.up, self.down, self.up_bias, self.down_bias) if name is not None]

    def run(
        self, module: nn.Module, x: Tensor, ids: Tensor, scores: Tensor, adapters: ExpertAdapters | None = None
    ) -> Tensor:
        """x [T, H], ids and scores [T, K]: [T, H]. What was routed where is noted by the batch that is served.

        Inside of autocast the products are in autocast's dtype, as those of a linear layer.
        """
        context = get_forward_context()
        if context is not None:
            context.record_routing(self.layer, ids)
        recompute = getattr(module, "recompute_experts", False)
        post: Any = None if self.post is None else getattr(module, self.post)
        weights, source = self.weights(module), x
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            source, weights, adapters = x.to(dtype), _cast(weights, dtype), adapters and _cast(adapters, dtype)
        return mix(source, ids, scores, weights, adapters=adapters, post=post, recompute=recompute).to(x.dtype)

    def make_forward(self) -> Callable[..., Tensor]:
        """A forward ``(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K])``; its ``layout`` is this."""
        parts = self

        def forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return parts.run(self, hidden_states, top_k_index, top_k_weights)

        forward.layout = parts  # type: ignore[attr-defined]
        return forward


def layout_of(module: nn.Module) -> Experts | None:
    """How the parameters of a patched module of experts lie; None for another module.

    It goes with the forward that a patch put on the module: copies have it too, and compilers can follow.
    """
    return getattr(module.forward, "layout", None)


def expert_layers(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The patched modules of experts of a model, and the names of their parameters: see ``shard_experts``."""
    layouts = {module: layout_of(module) for module in model.modules()}
    return {module: parts.names() for module, parts in layouts.items() if parts is not None}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Named tuples of tensors, and of tuples of them, in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    if isinstance(value, tuple):
        parts = [_cast(part, dtype) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
