"""Linear layers of one input, which run as one GEMM where their weights lie one after another in memory."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from toolkit.ops.joined_linear import joined_linear, lie_together
from toolkit.ops.transforms import transformed

JOINED = "_toolkit_joined"
"""The attribute of a module whose linear layers' weights were joined. Memory that happens to adjoin is not used."""


def linear_outputs(module: nn.Module, names: Sequence[str], x: Tensor) -> Sequence[Tensor]:
    """``[getattr(module, name)(x) for name in names]``, called as modules; by ``joined_linear`` where the layers
    are nothing but linear layers whose weights lie together (``toolkit.patch(model, join_weights=True)``).

    Args:
        module: whose children are called.
        names: of children that are handed the same input.
        x: [..., K].

    Returns:
        The outputs in the order of ``names``, [..., N_i] each: views of one tensor, or separate ones.
    """
    layers: list[Any] = [getattr(module, name) for name in names]
    found = _weights_together(layers, x) if JOINED in module.__dict__ else None
    if found is None:
        return [layer(x) for layer in layers]
    weights, biases = found
    return torch.split(joined_linear(x, weights, biases), [len(weight) for weight in weights], -1)


def with_one_input(forward: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """``forward``, which calls its module's children ``names`` by ``linear_outputs``."""
    forward.one_input = names  # type: ignore[attr-defined]
    return forward


def names_of_one_input(forward: Any) -> tuple[str, ...]:
    """What was given to ``with_one_input``; () for any other forward."""
    names: tuple[str, ...] = getattr(forward, "one_input", ())
    return names


def _weights_together(layers: Sequence[Any], x: Tensor) -> tuple[list[Tensor], list[Tensor]] | None:
    """Weights and biases of layers whose calls are nothing but their GEMMs, on weights that lie together; else None."""
    if torch.compiler.is_compiling() or transformed() or torch.is_autocast_enabled(x.device.type):
        return None
    if not all(map(is_plain_linear, layers)) or _has_any_global_hook():
        return None
    weights = [layer.weight for layer in layers]
    biases = [bias for layer in layers if (bias := layer.bias) is not None]
    if len(biases) not in (0, len(layers)) or len({one.requires_grad for one in chain(weights, biases)}) > 1:
        return None
    if weights[0].dtype is not x.dtype or not lie_together(weights) or (biases and not lie_together(biases)):
        return None
    return weights, biases


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a call of ``layer`` is ``torch.nn.functional.linear`` of its weight and bias: nobody replaced its
    forward, and no hook of it wants to see the call."""
    own = layer.__dict__
    return type(layer) is nn.Linear and "forward" not in own and not any(map(own.__getitem__, _HOOKS))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
