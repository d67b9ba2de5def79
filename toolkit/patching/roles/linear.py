"""Linear layers, in bitwise mode: cuBLAS and MKL GEMMs are not batch-invariant."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from toolkit.modules.linear import linear_forward, transposed_linear_forward
from toolkit.numerics import Numerics
from toolkit.patching.claim import Claim, Skipped
from toolkit.patching.conditions import error_of
from toolkit.patching.probe import random_input, required_arguments
from toolkit.patching.probe_copy import Slices
from toolkit.patching.search import Candidate, search


def linear_candidates(module: nn.Module) -> list[Candidate] | None:
    """The one candidate of a plain ``nn.Linear`` (not of a subclass, quantised or adapted), or of a leaf with a weight
    [K, N] and a bias [N]."""
    weight: Any = getattr(module, "weight", None)
    op, forward, outputs = "linear (fixed reduction order)", linear_forward, 0
    if _is_transposed(module):
        op, forward, outputs = "linear (fixed reduction order, weight [K, N])", transposed_linear_forward, 1
    elif type(module) is not nn.Linear:
        return None
    slices = Slices.of(weight.shape[outputs], {"weight": (outputs, 1), "bias": (0, 1)})

    def batches(copied: nn.Module) -> list[list[Tensor]]:
        return [[random_input(2, 3, weight.shape[1 - outputs], like=copied)]]

    return [(op, forward, partial(error_of, module, forward, batches, slices=slices))]


def _is_transposed(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    leaf = next(module.children(), None) is None
    if isinstance(module, nn.Linear) or not leaf or set(parameters) != {"weight", "bias"}:
        return False
    weight, bias = parameters["weight"], parameters["bias"]
    return weight.dim() == 2 and bias.shape == weight.shape[1:] and len(required_arguments(module)) == 1


def find(model: Any, numerics: Numerics) -> list[Claim | Skipped]:
    """Claims on linear layers except the head; none in fast mode."""
    if numerics is not Numerics.BITWISE:
        return []
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return search(model, "linear", lambda module: None if module is output else linear_candidates(module))
