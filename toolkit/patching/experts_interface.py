"""The registered experts function of transformers: how any model's experts reach ours."""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

NAME = "toolkit"


def own_forward(module: nn.Module) -> Any:
    """The forward that a module's class was written with, in front of any dispatch."""
    return inspect.unwrap(type(module).forward)


def dispatches(module: nn.Module) -> bool:
    """Whether the module's class hands its work to the experts interface."""
    return hasattr(module, "_is_expert_parallel") and own_forward(module) is not type(module).forward


def experts_function(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """transformers' experts contract: hidden states [T, H], ids and weights [T, K] to [T, H].

    Proven modules have a forward of their own in front of this. What comes here runs the code that its class was
    written with: right whatever it is, and in the bitwise tier the same bits in any batch, one expert after the other.
    """
    return own_forward(module)(module, *args, **kwargs)


def register() -> None:
    """Make ``experts_implementation="toolkit"`` known; no model changes by it."""
    ExpertsInterface.register(NAME, experts_function)
