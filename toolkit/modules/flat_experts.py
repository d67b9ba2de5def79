"""Experts whose matrices are flat: those of all experts below each other in one matrix [E F, H] (DBRX).

Shapes: T tokens, E experts, K selected per token, H width, F width between the GEMMs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from toolkit.moe import dispatch_plan
from toolkit.ops.gated_activation import gated_activation
from toolkit.ops.grouped_linear import combine, grouped_linear
from toolkit.state.active import get_forward_context


@dataclass(frozen=True)
class FlatExperts:
    """The names of a module's matrices, which are read as views [E, F, H], and what they compute.

    ``y = sum_k w_k W_down[e_k]^T (f(W_gate[e_k] x) * W_up[e_k] x)``. E is the module's attribute ``num_experts``.

    Args:
        gate, up, down: (dotted) attributes of the matrices [E F, H].
        activation: f, of ``toolkit.ops.gated_activation``.
        layer: the index among the model's MoE layers, under which routing is recorded and replayed.
    """

    gate: str
    up: str
    down: str
    activation: str
    layer: int = 0

    def make_forward(self) -> Callable[..., Tensor]:
        """A forward of hidden states [B, ..., H], ids and weights [T, K] to [B, T / B, H]; it records the routing.

        Inside autocast the GEMMs run in its dtype, as those of a linear layer.
        """
        parts, find = self, attrgetter(self.gate, self.up, self.down)

        def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            context = get_forward_context()
            if context is not None:
                context.record_routing(parts.layer, top_k_index)
            x, dtype = hidden_states.reshape(-1, hidden_states.shape[-1]), hidden_states.dtype
            if torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
            source = x.to(dtype)
            gate, up, down = (weight.to(dtype).unflatten(0, (self.num_experts, -1)) for weight in find(self))
            plan = dispatch_plan(top_k_index, self.num_experts)
            # Two GEMMs over the same rows: to join the matrices would copy them in every forward.
            gated = grouped_linear(source, gate, None, plan, gather=True)
            linear = grouped_linear(source, up, None, plan, gather=True)
            inner = gated_activation(gated, linear, parts.activation)
            rows = grouped_linear(inner, down, None, plan, transposed=True)
            out = combine(rows, plan.rows, top_k_weights).to(x.dtype)
            return out.view(hidden_states.shape[0], -1, hidden_states.shape[-1])

        return forward
