"""MoE layers whose experts take all tokens, scaled by scores: the layer as a whole is proven, experts and router in it.

Such a layer computes every expert for every token, and most of it is 0. The roles ``experts`` and ``router`` know it by
the forward of its experts, which takes nothing but hidden states.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from toolkit.modules.moe_experts import MoeExperts
from toolkit.modules.scaled_experts import ScaledExperts
from toolkit.moe import ExpertLayout
from toolkit.ops.activation import KINDS
from toolkit.patching.claim import Claim, ProbeError, Skipped, replace_forward, together
from toolkit.patching.conditions import error_of
from toolkit.patching.instance_forward import UNPROVEN, foreign_forward
from toolkit.patching.probe import random_input, with_forward
from toolkit.patching.probe_copy import Slices
from toolkit.patching.roles.moe_layers import FEW, MoeLayer, clear_choice, matrix_rows
from toolkit.patching.search import prove
from toolkit.patching.settings import guarded, settings_of

_TOKENS = 33


def is_scaled(moe: MoeLayer) -> bool:
    """Whether the experts of a layer are handed hidden states alone, [E T, H]."""
    return moe.stacked and len(inspect.signature(type(moe.module).forward).parameters) == 2  # with self


def is_router_of_scaled(module: nn.Module, moe: MoeLayer) -> bool:
    """Whether a module beside such experts has one row per expert."""
    return is_scaled(moe) and isinstance(module, nn.Linear) and moe.num_experts in matrix_rows(module)


def _parts(moe: MoeLayer, parent: nn.Module) -> tuple[ScaledExperts, str, str] | None:
    """The parts of a layer, and the names of the weights of its experts; None where it has others."""
    names = {module: name for name, module in parent.named_children()}
    routers = [names[module] for module in moe.siblings.values() if is_router_of_scaled(module, moe)]
    weights = [name for name, p in moe.module.named_parameters(recurse=False) if p.dim() == 3]
    top_k = getattr(parent, "top_k", None)
    if len(routers) != 1 or len(weights) != 2 or not isinstance(top_k, int):
        return None
    shared = tuple(names[one] for one in moe.siblings.values() if names[one] != routers[0])
    own = dict(moe.module.named_parameters(recurse=False))
    up, down = sorted(weights, key=lambda name: -own[name].shape[2])
    return ScaledExperts(routers[0], names[moe.module], shared, top_k, moe.layer), up, down


def _slices(moe: MoeLayer, parent: nn.Module, parts: ScaledExperts, up: str, down: str) -> Slices:
    own = dict(parent.named_parameters())
    up, down, router = f"{parts.experts}.{up}", f"{parts.experts}.{down}", f"{parts.router}.weight"
    found = Slices.of(moe.num_experts, {up: (0, 1), down: (0, 1), router: (0, 1)}, max(FEW, parts.top_k + 1))
    found |= Slices.of(own[down].shape[1], {up: (2, 2), down: (1, 1)})
    for shared in parts.shared:
        gate, back = f"{shared}.gate_proj.weight", f"{shared}.down_proj.weight"
        if {gate, back, f"{shared}.up_proj.weight"} <= set(own):
            inner = {gate: (0, 1), f"{shared}.up_proj.weight": (0, 1), back: (1, 1)}
            found |= Slices.of(own[gate].shape[0], inner)
    return found


def _proof(parts: ScaledExperts, experts: MoeExperts, slices: Slices, parent: nn.Module) -> ProbeError:
    forward = parts.make_forward()
    inside = {parts.experts: experts.make_forward(), parts.router: parts.router_forward()}

    def candidate(self: Any, x: Tensor) -> Any:
        modules = [getattr(self, name) for name in inside]
        for module, own in zip(modules, inside.values(), strict=True):
            module.__dict__["forward"] = with_forward(module, own)
        try:
            return forward(self, x)
        finally:
            for module in modules:
                del module.__dict__["forward"]

    def batches(copied: nn.Module) -> list[list[Tensor]]:
        weight = getattr(copied, parts.router).weight
        x = random_input(_TOKENS, weight.shape[1], like=copied)
        x = x[clear_choice(x, weight, parts.top_k)]
        return [[scale * x[None]] for scale in (1.0, 30.0)]

    return error_of(parent, candidate, batches, slices=slices)


def find_scaled(model: nn.Module, moe: MoeLayer, proven: dict[Any, Any], key: Any) -> list[Claim | Skipped]:
    """Claims on experts and router of a layer that ``is_scaled``, which are installed together with its forward.

    Args:
        proven: verdicts by key, of layers that compute the same function.
    """
    parent_path = moe.path.rpartition(".")[0]
    parent = model.get_submodule(parent_path)
    found, other = _parts(moe, parent), foreign_forward(parent)
    if other is not None:
        return [Skipped("experts", moe.path, UNPROVEN.format(other))]
    if found is None:
        return [Skipped("experts", moe.path, "its experts take all tokens, scaled by something else than a router")]
    parts, up, down = found
    if key not in proven:
        slices = _slices(moe, parent, parts, up, down)
        options: list[tuple[str, MoeExperts, Callable[[], ProbeError]]] = []
        for activation in sorted(KINDS, key=lambda kind: kind != "silu"):
            for interleaved in (False, True):
                experts = MoeExperts(up, down, ExpertLayout(activation, "input", True, interleaved))
                words = f"{activation}, {'interleaved' if interleaved else 'halves'}, transposed, scores at the input"
                options.append((f"experts ({words})", experts, partial(_proof, parts, experts, slices, parent)))
        proven[key] = prove(options)
    verdict = proven[key]
    if isinstance(verdict, str):
        return [Skipped("experts", moe.path, verdict)]
    op, experts, error = verdict
    router_path = f"{parent_path}.{parts.router}"
    router = model.get_submodule(router_path)
    forwards = {
        moe.module: guarded(replace(experts, layer=moe.layer).make_forward(), settings_of(moe.module)),
        router: guarded(parts.router_forward(), settings_of(router)),
        parent: guarded(parts.make_forward(), settings_of(parent)),
    }
    install = together(*(replace_forward(module, forward) for module, forward in forwards.items()))
    routing = f"route (sigmoid of the top {parts.top_k})"
    return [
        Claim("experts", moe.path, moe.module, op, error, install),
        Claim("router", router_path, router, routing, error, _with_the_experts),
    ]


def _with_the_experts() -> Callable[[], None]:
    return _nothing


def _nothing() -> None:
    """Nothing to undo: the claim on the experts installs all three forwards, which call each other."""
