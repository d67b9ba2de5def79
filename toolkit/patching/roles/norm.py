"""Norms: leaf modules with one vector of weights (or none) and an epsilon."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from toolkit.modules.norm import layer_norm_forward, rms_norm_forward
from toolkit.numerics import Numerics
from toolkit.patching.claim import Claim, ProbeError, Skipped
from toolkit.patching.conditions import error_of
from toolkit.patching.probe import random_input, required_arguments
from toolkit.patching.search import Candidate, search

DEFAULT_EPSILON = 1e-5  # of torch's layer norm, for a module without an epsilon


def _epsilon(module: nn.Module) -> float | str | None:
    """The name of the module's own epsilon: its only small positive float."""
    names = [name for name, v in module.__dict__.items() if isinstance(v, float) and 0.0 < v < 1e-2]
    if not names and hasattr(module, "normalized_shape"):
        return DEFAULT_EPSILON
    return names[0] if len(names) == 1 else None


def _normalized_size(module: nn.Module) -> int:
    """The size of the dimension that it normalises; an arbitrary one for a module that takes any."""
    weight = next(iter(module.parameters()), None)
    shape = weight.shape if weight is not None else getattr(module, "normalized_shape", (24,))
    return int(shape[-1])


def _probe(module: nn.Module, forward: Callable[..., Any]) -> ProbeError:
    size = _normalized_size(module)

    def batches(copied: nn.Module) -> list[list[Tensor]]:
        # Small inputs make the epsilon matter, large ones the order of squaring and averaging.
        return [[random_input(3, 5, size, like=copied, scale=scale)] for scale in (1.0, 1e-3, 30.0)]

    return error_of(module, forward, batches)


def _candidates(module: nn.Module) -> list[Candidate] | None:
    parameters = dict(module.named_parameters())
    epsilon = _epsilon(module)
    if epsilon is None or next(module.children(), None) is not None or not set(parameters) <= {"weight", "bias"}:
        return None
    if any(parameter.dim() != 1 for parameter in parameters.values()):
        return None
    if len(required_arguments(module)) != 1:
        return None
    options = [("layer_norm", layer_norm_forward(epsilon))]
    if "weight" in parameters:
        options.append(("layer_norm (1 + weight)", layer_norm_forward(epsilon, 1.0)))
    if "bias" not in parameters:
        options = [
            ("rms_norm", rms_norm_forward(epsilon, 0.0)),
            ("rms_norm (1 + weight)", rms_norm_forward(epsilon, 1.0)),
            *options,
        ]
    return [(op, forward, partial(_probe, module, forward)) for op, forward in options]


def find(model: nn.Module, numerics: Numerics) -> list[Claim | Skipped]:
    """Claims on RMS norms and layer norms."""
    return search(model, "norm", _candidates)
