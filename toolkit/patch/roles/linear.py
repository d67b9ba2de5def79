"""Linear layers, in the bitwise tier: the vendor's product changes bits with the number of rows."""

from typing import Any

from torch import nn

from toolkit.modules.linear import linear_forward
from toolkit.numerics import Numerics
from toolkit.patch.claim import Claim, ProbeError, Refusal
from toolkit.patch.probe import compare, random_input, twin, with_forward
from toolkit.patch.roles.search import Candidate, search


def linear_candidates(module: nn.Module) -> list[Candidate] | None:
    """The one candidate of a plain ``nn.Linear``; subclasses (quantised, adapted) are something else."""
    if type(module) is not nn.Linear:
        return None

    def probe() -> ProbeError:
        copied = twin(module)
        x = random_input(2, 3, module.in_features, like=copied)
        return compare(
            with_forward(copied, linear_forward),
            with_forward(copied, nn.Linear.forward),
            [[x]],
            list(copied.parameters()),
        )

    return [("linear (fixed K order)", linear_forward, probe)]


def find(model: Any, numerics: Numerics) -> list[Claim | Refusal]:
    if numerics is not Numerics.BITWISE:
        return []
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return search(model, "linear", lambda module: None if module is output else linear_candidates(module))
