"""Experts in flat matrices [E F, H] of a child: which is gate, up and down is found by proving it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import Any

from torch import Tensor, nn

from toolkit.modules.flat_experts import FlatExperts
from toolkit.ops.activation import KINDS
from toolkit.patching.claim import Claim, ProbeError, Skipped, replace_forward
from toolkit.patching.conditions import error_of
from toolkit.patching.instance_forward import UNPROVEN, foreign_forward
from toolkit.patching.probe import signature_key
from toolkit.patching.probe_copy import Slices
from toolkit.patching.roles.moe_layers import FEW, MoeLayer, expert_batches
from toolkit.patching.search import prove
from toolkit.patching.settings import Settings, guarded, settings_of

_KEPT = 32  # of F in a probe copy


def flat_slices(module: nn.Module, count: int, few: int, prefix: str = "") -> Slices:
    """The first ``few`` of ``count`` experts of a module with flat matrices, and few columns between their GEMMs.

    Args:
        prefix: of the parameters' names.
    """
    own = dict(module.named_parameters())
    inner = next(iter(own.values())).shape[0] // count
    experts, columns = min(few, count), min(_KEPT, inner)
    return Slices({prefix + name: ((0, experts * columns),) for name in own}, {inner: columns, count: experts})


def _settings(module: nn.Module, child: str) -> Settings:
    """Those of a module and of the child that holds its matrices, whose class is part of what the module computes."""
    holder = module.get_submodule(child)
    inner = tuple((f"{child}.{name}", value) for name, value in settings_of(holder))
    return (*settings_of(module), (f"{child}.__class__", type(holder)), *inner)


def _error(module: nn.Module, count: int, parts: FlatExperts) -> ProbeError:
    width = next(module.parameters()).shape[1]

    def batches(copied: nn.Module) -> list[list[Tensor]]:
        return expert_batches(copied, min(count, FEW), width)

    return error_of(module, parts.make_forward(), batches, slices=flat_slices(module, count, FEW))


def _candidates(module: nn.Module, count: int) -> list[tuple[str, FlatExperts, Callable[[], ProbeError]]]:
    found: list[tuple[str, FlatExperts, Callable[[], ProbeError]]] = []
    for activation in sorted(KINDS, key=lambda kind: kind != "silu"):
        for gate, up, down in permutations(dict(module.named_parameters()), 3):
            parts = FlatExperts(gate, up, down, activation)
            words = f"experts ({activation}, flat: gate {gate}, up {up}, down {down})"
            found.append((words, parts, partial(_error, module, count, parts)))
    return found


def find_flat(moe: MoeLayer, proven: dict[Any, Any]) -> Claim | Skipped:
    """A claim on experts that are ``flat``, or why they keep their forward.

    Args:
        proven: verdicts by key, of modules that compute the same function.
    """
    module = moe.module
    child = next(iter(dict(module.named_parameters()))).rpartition(".")[0]
    other = foreign_forward(module.get_submodule(child))
    if other is not None:
        return Skipped("experts", moe.path, UNPROVEN.format(other))
    key = signature_key(module)
    if key not in proven:
        proven[key] = prove(_candidates(module, moe.num_experts))
    verdict = proven[key]
    if isinstance(verdict, str):
        return Skipped("experts", moe.path, verdict)
    op, parts, error = verdict
    forward = guarded(replace(parts, layer=moe.layer).make_forward(), _settings(module, child))
    return Claim("experts", moe.path, module, op, error, replace_forward(module, forward))
