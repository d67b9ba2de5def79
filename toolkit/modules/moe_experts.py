"""A module's experts: which parameters they are, and the forward that runs them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.moe import LOCAL, ExpertAdapters, ExpertLayout, ExpertWeights, moe_forward
from toolkit.moe.sharding import DISPATCHER
from toolkit.state.active import get_forward_context


@dataclass(frozen=True)
class MoeExperts:
    """The names of a module's expert parameters, and their layout.

    A module whose attribute ``recompute_experts`` is true saves no activations of rows for the backward. A module that
    is sharded holds its dispatcher in an attribute (``toolkit.moe.sharding.DISPATCHER``).

    Args:
        up, down: attributes of the weights.
        layout: what they compute.
        up_bias, down_bias: attributes of the biases, or None.
        post_norm: the attribute of a norm of every expert's output, or None.
        layer: the index among the model's MoE layers, under which routing is recorded and replayed.
    """

    up: str
    down: str
    layout: ExpertLayout
    up_bias: str | None = None
    down_bias: str | None = None
    post_norm: str | None = None
    layer: int = 0

    def weights(self, module: nn.Module) -> ExpertWeights:
        """The module's parameters as they are now."""
        up_bias, down_bias = (
            None if name is None else getattr(module, name) for name in (self.up_bias, self.down_bias)
        )
        return ExpertWeights(getattr(module, self.up), getattr(module, self.down), self.layout, up_bias, down_bias)

    def names(self) -> list[str]:
        """The parameters [E, ...]."""
        return [name for name in (self.up, self.down, self.up_bias, self.down_bias) if name is not None]

    def run(
        self,
        module: nn.Module,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        adapters: ExpertAdapters | None = None,
    ) -> Tensor:
        """[T, H] of x [T, H], topk_ids and topk_weights [T, K]. The forward context records the routing.

        Inside autocast the GEMMs run in its dtype, as those of a linear layer.
        """
        context = get_forward_context()
        if context is not None:
            context.record_routing(self.layer, topk_ids)
        post_norm: Any = None if self.post_norm is None else getattr(module, self.post_norm)
        weights, source = self.weights(module), x
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            source, weights, adapters = x.to(dtype), weights.to(dtype), adapters and adapters.to(dtype)
        out = moe_forward(
            source,
            topk_ids,
            topk_weights,
            weights,
            getattr(module, DISPATCHER, LOCAL),
            adapters=adapters,
            post_norm=post_norm,
            recompute=getattr(module, "recompute_experts", False),
        )
        return out.to(x.dtype)

    def make_forward(self) -> Callable[..., Tensor]:
        """A forward of hidden_states [T, H], top_k_index and top_k_weights [T, K]; its ``moe_experts`` is this."""
        parts = self

        def forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return parts.run(self, hidden_states, top_k_index, top_k_weights)

        forward.moe_experts = parts  # type: ignore[attr-defined]
        return forward


def moe_experts_of(module: nn.Module) -> MoeExperts | None:
    """The ``MoeExperts`` of a patched module of experts; None for another module.

    It is kept on the forward that the patch put on the module: copies have it too, and compilers can follow.
    """
    return getattr(module.forward, "moe_experts", None)


def expert_layers(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The patched modules of experts of a model, and the names of their parameters: see ``shard_experts``."""
    found = {module: moe_experts_of(module) for module in model.modules()}
    return {module: parts.names() for module, parts in found.items() if parts is not None}
