"""Plain activations: elementwise modules without parameters."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.modules.mlp import activation_forward
from toolkit.numerics import Numerics
from toolkit.ops.activation import plain_kinds
from toolkit.patching.claim import Claim, ProbeError, Skipped
from toolkit.patching.conditions import error_of
from toolkit.patching.probe import required_arguments
from toolkit.patching.probe_copy import probe_copy
from toolkit.patching.search import Candidate, search


def _grid() -> Tensor:
    """[1, 304] values around zero and in both tails."""
    return torch.cat([torch.linspace(-9.0, 9.0, 301), torch.tensor([-50.0, 0.0, 50.0])])[None]


def _probe(module: nn.Module, forward: Callable[..., Any]) -> ProbeError:
    return error_of(module, forward, lambda copied: [[_grid()]])


def _elementwise(module: nn.Module) -> bool:
    """Whether each output depends on one input only: every other value changes, and the outputs of the rest do not."""
    values, copied = _grid()[:, :-3], probe_copy(module)  # without the tails, which would dominate a softmax
    others = values.clone()
    others[:, ::2] += 1.0
    try:
        with torch.no_grad():
            first, second = (type(copied).forward(copied, one) for one in (values, others))
    except Exception:
        return False
    same_shape = isinstance(first, Tensor) and first.shape == values.shape
    return same_shape and torch.equal(first[:, 1::2], second[:, 1::2])


def _candidates(module: nn.Module) -> list[Candidate] | None:
    if next(module.children(), None) is not None or next(module.parameters(), None) is not None:
        return None
    if next(module.buffers(), None) is not None or len(required_arguments(module)) != 1:
        return None
    if isinstance(module, (nn.Identity, nn.Dropout)) or not _elementwise(module):
        return None
    return [
        (kind, forward, partial(_probe, module, forward))
        for kind, forward in ((kind, activation_forward(kind)) for kind in plain_kinds())
    ]


def find(model: nn.Module, numerics: Numerics) -> list[Claim | Skipped]:
    """Claims on elementwise modules without parameters."""
    return search(model, "activation", _candidates, guard=True)
