"""Gated MLPs: gate and up projections, separate or packed in one, an activation, and a down projection."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations, product
from typing import Any

from torch import Tensor, nn

from toolkit.modules.mlp import GatedMlp, PackedMlp
from toolkit.numerics import Numerics
from toolkit.ops.activation import KINDS
from toolkit.patching.claim import Claim, ProbeError, Skipped
from toolkit.patching.conditions import error_of
from toolkit.patching.probe import random_input, required_arguments
from toolkit.patching.probe_copy import Slices
from toolkit.patching.search import Candidate, search

# The largest reaches the tails of gates, past the limits at which some are clamped.
_SCALES = (1.0, 4.0, 16.0)


def _probe(module: nn.Module, mlp: GatedMlp | PackedMlp, forward: Callable[..., Any]) -> ProbeError:
    down: nn.Linear = getattr(module, mlp.down)

    def batches(copied: nn.Module) -> list[list[Tensor]]:
        return [[random_input(2, 3, down.out_features, like=copied, scale=scale)] for scale in _SCALES]

    outputs = {mlp.gate_up: 2} if isinstance(mlp, PackedMlp) else {mlp.gate: 1, mlp.up: 1}
    dimensions = {f"{name}.{part}": (0, times) for name, times in outputs.items() for part in ("weight", "bias")}
    slices = Slices.of(down.in_features, {**dimensions, f"{mlp.down}.weight": (1, 1)})
    return error_of(module, forward, batches, slices=slices)


def _separate(shapes: dict[str, tuple[int, int]], kinds: list[str]) -> Iterator[tuple[str, GatedMlp]]:
    for gate, up, down in permutations(shapes, 3):
        if shapes[gate] == shapes[up] == shapes[down][::-1]:
            yield from ((f"gated_activation ({kind} of {gate})", GatedMlp(gate, up, down, kind)) for kind in kinds)


def _packed(shapes: dict[str, tuple[int, int]], kinds: list[str]) -> Iterator[tuple[str, PackedMlp]]:
    for gate_up, down in permutations(shapes, 2):
        if shapes[gate_up] != (shapes[down][1], 2 * shapes[down][0]):
            continue
        for interleaved, gate_first, kind in product((False, True), (True, False), kinds):
            half = "even" if interleaved else "first"
            if not gate_first:
                half = "odd" if interleaved else "second"
            mlp = PackedMlp(gate_up, down, kind, gate_first, interleaved)
            yield f"gated_activation ({kind} of the {half} half of {gate_up})", mlp


def _candidates(module: nn.Module) -> list[Candidate] | None:
    projections = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    others = [child for _, child in module.named_children() if not isinstance(child, nn.Linear)]
    if len(projections) not in (2, 3) or len(required_arguments(module)) != 1:
        return None
    if any(next(child.parameters(), None) is not None or isinstance(child, nn.Dropout) for child in others):
        return None
    kinds = sorted(KINDS, key=lambda kind: kind != "silu")  # the most common one first
    shapes = {name: (child.in_features, child.out_features) for name, child in projections.items()}
    found = _separate(shapes, kinds) if len(shapes) == 3 else _packed(shapes, kinds)
    options = [(op, mlp, mlp.make_forward()) for op, mlp in found]
    return [(op, forward, partial(_probe, module, mlp, forward)) for op, mlp, forward in options] or None


def find(model: nn.Module, numerics: Numerics) -> list[Claim | Skipped]:
    """Claims on gated MLPs."""
    return search(model, "mlp", _candidates, guard=True)
