"""The experts function that we register with transformers."""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

NAME = "toolkit"


def own_forward(module: nn.Module) -> Any:
    """The forward of a module's class, without transformers' dispatch around it."""
    return inspect.unwrap(type(module).forward)


def dispatches(module: nn.Module) -> bool:
    """Whether the module's class dispatches through the experts interface.

    Its decorator wraps the forward and describes the layout on the module, in every version of transformers;
    ``_is_expert_parallel`` is not there in 5.17.
    """
    described = all(hasattr(module, name) for name in ("is_concatenated", "is_transposed", "has_gate"))
    return described and own_forward(module) is not type(module).forward


def experts_function(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """[T, H] of hidden states [T, H], topk_ids and topk_weights [T, K], as transformers' experts interface asks.

    Patched modules have a forward that precedes this. All others run the code of their class, expert by expert, which
    in bitwise mode is batch-invariant.
    """
    out: Tensor = own_forward(module)(module, *args, **kwargs)
    return out


def register() -> None:
    """Registers ``experts_implementation="toolkit"``; changes no model."""
    ExpertsInterface.register(NAME, experts_function)
