"""Linear layers, in bitwise mode: cuBLAS and MKL GEMMs are not batch-invariant."""

from typing import Any

from torch import nn

from toolkit.modules.linear import linear_forward, transposed_linear_forward
from toolkit.numerics import Numerics
from toolkit.patching.claim import Claim, ProbeError, Skipped
from toolkit.patching.probe import compare, probe_copy, random_input, required_arguments, with_forward
from toolkit.patching.search import Candidate, search


def linear_candidates(module: nn.Module) -> list[Candidate] | None:
    """The one candidate of a plain ``nn.Linear`` (not of a subclass, quantised or adapted), or of a leaf with a weight
    [K, N] and a bias [N]."""
    weight: Any = getattr(module, "weight", None)
    op, forward, in_features = "linear (fixed reduction order)", linear_forward, 0
    if type(module) is nn.Linear:
        in_features = weight.shape[1]
    elif _is_transposed(module):
        op, forward, in_features = (
            "linear (fixed reduction order, weight [K, N])",
            transposed_linear_forward,
            weight.shape[0],
        )
    else:
        return None

    def probe() -> ProbeError:
        copied = probe_copy(module)
        x = random_input(2, 3, in_features, like=copied)
        return compare(
            with_forward(copied, forward), with_forward(copied, type(copied).forward), [[x]], list(copied.parameters())
        )

    return [(op, forward, probe)]


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
