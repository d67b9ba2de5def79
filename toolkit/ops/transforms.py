"""What torch's function transforms and second derivatives find in the ops.

torch's registry of ops knows first derivatives of reverse mode alone: to ``torch.func`` and forward-mode AD an op would
be opaque, or a constant. There the references run, which are plain torch. A second derivative of an op is an error,
where it would otherwise be missing without a word.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from toolkit.errors import ToolkitError


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode AD is active, so that only plain torch gives derivatives.

    Raises:
        ToolkitError: inside ``torch.vmap``.
    """
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    vmapped = torch._C._functorch.TransformType.Vmap
    if any(level.key() == vmapped for level in torch._C._functorch.get_interpreter_stack() or ()):
        raise ToolkitError(
            "torch.vmap must be outside of a patched model's calls, got one inside of it; call the model once with the "
            "whole batch, or sample by sample in a loop."
        )
    return True


class _FirstDerivativeOnly(torch.autograd.Function):
    """A gradient, whose own derivative is an error."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Any) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tuple(None if one is None else one.view_as(one) for one in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise ToolkitError(
            f"op {ctx.name} has no second derivative; take it by torch.func (grad of grad, hessian, jvp), which runs "
            "the ops in plain torch, or unpatch the model."
        )


def first_derivative_only(name: str, results: Sequence[Any], arguments: Sequence[Any]) -> Sequence[Any]:
    """``results`` of the backward of op ``name`` from ``arguments``; differentiating them again raises.

    Both may hold lists of tensors.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return results
    flat, structure = tree_flatten(list(results))
    checked = _FirstDerivativeOnly.apply(name, len(flat), *flat, *tree_leaves(arguments))  # type: ignore[no-untyped-call]
    found: list[Any] = tree_unflatten(checked, structure)
    return found
