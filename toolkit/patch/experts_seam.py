"""The registered experts function of transformers: how any model's experts reach ours."""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from toolkit.modules.experts import LAYOUTS

NAME = "toolkit"


def own_forward(module: nn.Module) -> Any:
    """The forward that a module's class was written with, in front of any dispatch."""
    return inspect.unwrap(type(module).forward)


def dispatches(module: nn.Module) -> bool:
    """Whether the module's class hands its work to the experts interface."""
    return hasattr(module, "_is_expert_parallel") and own_forward(module) is not type(module).forward


def experts_function(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **kwargs: Any
) -> Tensor:
    """transformers' experts contract: hidden states [T, H], ids and weights [T, K] to [T, H].

    A module whose layout was not proven runs its own code: right whatever it is, and in the bitwise tier the same bits
    in any batch, for it takes one expert after the other.
    """
    parts = LAYOUTS.get(module)
    if parts is None:
        return own_forward(module)(module, hidden_states, top_k_index, top_k_weights, **kwargs)
    return parts.run(module, hidden_states, top_k_index, top_k_weights)


def register() -> None:
    """Make ``experts_implementation="toolkit"`` known; no model changes by it."""
    ExpertsInterface.register(NAME, experts_function)
