"""Plain activations: elementwise modules without parameters."""

from functools import partial

import torch
from torch import Tensor, nn

from toolkit.modules.mlp import activation_forward
from toolkit.numerics import Numerics
from toolkit.ops.activation import plain_kinds
from toolkit.patching.claim import Claim, ProbeError, Skipped
from toolkit.patching.probe import compare, probe_copy, required_arguments, with_forward
from toolkit.patching.search import Candidate, search


def _grid() -> Tensor:
    """Values around zero and in both tails, an odd number of them."""
    return torch.cat([torch.linspace(-9.0, 9.0, 301), torch.tensor([-50.0, 0.0, 50.0])])[None]


def _probe(module: nn.Module, forward) -> ProbeError:
    copied = probe_copy(module)
    return compare(with_forward(copied, forward), with_forward(copied, type(copied).forward), [[_grid()]])


def _elementwise(module: nn.Module) -> bool:
    """Whether it maps each value by itself: every other value changes, and what the rest become does not."""
    values, copied = _grid()[:, :-3], probe_copy(module)  # without the tails, beside which a softmax sees nothing else
    others = values.clone()
    others[:, ::2] += 1.0
    try:
        with torch.no_grad():
            first, second = (type(copied).forward(copied, one) for one in (values, others))
    except Exception:
        return False
    alike = isinstance(first, Tensor) and first.shape == values.shape
    return alike and torch.equal(first[:, 1::2], second[:, 1::2])


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
    return search(model, "activation", _candidates)
