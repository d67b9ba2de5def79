"""Adam with decoupled weight decay (Loshchilov & Hutter, 2019), its state named as the parameters are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toolkit.errors import ToolkitError


@dataclass(frozen=True)
class AdamParams:
    """The settings of one step, with the defaults of Tinker's API.

    Args:
        grad_clip_norm: gradients of a larger norm are scaled to it; 0 clips none.

    Raises:
        ToolkitError: for a value out of its range.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ToolkitError(f"adam_params.{name} must be a finite number >= 0, got {value}.")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ToolkitError(f"adam_params.{name} must be >= 0 and < 1, got {value}.")


@dataclass
class AdamState:
    """What Adam remembers of a tenant's parameters.

    Args:
        step: steps so far.
        mean: running mean of the gradient, of each parameter.
        square: running mean of its square.
    """

    step: int = 0
    mean: dict[str, Tensor] = field(default_factory=dict)
    square: dict[str, Tensor] = field(default_factory=dict)


def gradient_norm(gradients: Mapping[str, Tensor]) -> float:
    """The 2-norm of all gradients together, in float64, summed in the order of their names."""
    return math.sqrt(sum(float(gradients[name].double().square().sum()) for name in sorted(gradients)))


@torch.no_grad()
def adam_step(
    parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], state: AdamState, params: AdamParams
) -> float:
    """Write one step into the parameters, in place, and return the norm of the gradient before clipping.

    With g the clipped gradient and t the number of the step::

        m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
        p = p - lr weight_decay p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
    """
    norm = gradient_norm(gradients)
    scale = params.grad_clip_norm / norm if 0 < params.grad_clip_norm < norm else 1.0
    state.step += 1
    first = 1 - params.beta1**state.step
    second = math.sqrt(1 - params.beta2**state.step)
    for name, parameter in parameters.items():
        gradient = gradients[name] if scale == 1.0 else gradients[name] * scale
        mean = state.mean.setdefault(name, torch.zeros_like(parameter))
        square = state.square.setdefault(name, torch.zeros_like(parameter))
        mean.mul_(params.beta1).add_(gradient, alpha=1 - params.beta1)
        square.mul_(params.beta2).addcmul_(gradient, gradient, value=1 - params.beta2)
        parameter.mul_(1 - params.learning_rate * params.weight_decay)
        parameter.addcdiv_(mean, (square.sqrt() / second).add_(params.eps), value=-params.learning_rate / first)
    return norm
