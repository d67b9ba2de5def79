"""Gated MLPs: three projections, two of one shape and one back, and an activation."""

from functools import partial
from itertools import permutations

from torch import nn

from toolkit.modules.mlp import GatedMlp
from toolkit.numerics import Numerics
from toolkit.ops.activation import KINDS
from toolkit.patch.claim import Claim, ProbeError, Refusal
from toolkit.patch.probe import compare, random_input, required_arguments, twin, with_forward
from toolkit.patch.roles.search import Candidate, search

# The largest takes gates into their tails, past the limits at which some of them are clamped.
_SCALES = (1.0, 4.0, 16.0)


def _probe(module: nn.Module, mlp: GatedMlp) -> ProbeError:
    copied = twin(module)
    width = getattr(copied, mlp.gate).in_features
    batches = [[random_input(2, 3, width, like=copied, scale=scale)] for scale in _SCALES]
    original = with_forward(copied, type(copied).forward)
    return compare(with_forward(copied, mlp.forward()), original, batches, list(copied.parameters()))


def _candidates(module: nn.Module) -> list[Candidate] | None:
    projections = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    others = [child for _, child in module.named_children() if not isinstance(child, nn.Linear)]
    if len(projections) != 3 or len(required_arguments(module)) != 1:
        return None
    if any(next(child.parameters(), None) is not None or isinstance(child, nn.Dropout) for child in others):
        return None
    kinds = sorted(KINDS, key=lambda kind: kind != "silu")  # the usual one first: a probe of a wide layer is slow
    options: list[Candidate] = []
    for gate, up, down in permutations(projections):
        shapes = [(projections[n].in_features, projections[n].out_features) for n in (gate, up, down)]
        if shapes[0] != shapes[1] or shapes[2] != shapes[0][::-1]:
            continue
        for kind in kinds:
            mlp = GatedMlp(gate, up, down, kind)
            op = f"gated_activation ({kind} of {gate})"
            options.append((op, mlp.forward(), partial(_probe, module, mlp)))
    return options or None


def find(model: nn.Module, numerics: Numerics) -> list[Claim | Refusal]:
    return search(model, "mlp", _candidates)
