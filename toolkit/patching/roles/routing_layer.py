"""Layers that select experts themselves, of logits that their router returns: each is proven as a whole.

The settings are searched: how many experts a token goes to is the layer's ``top_k``, how weights are normalised is not
read.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from toolkit.modules.router import Router
from toolkit.modules.routing_layer import RoutingLayer
from toolkit.patching.claim import Claim, ProbeError, Skipped, replace_forward
from toolkit.patching.conditions import error_of
from toolkit.patching.instance_forward import UNPROVEN, foreign_forward
from toolkit.patching.probe import random_input, signature_key
from toolkit.patching.roles.flat_experts import flat_slices
from toolkit.patching.roles.moe_layers import MoeLayer, clear_choice, matrix_rows
from toolkit.patching.search import prove
from toolkit.patching.settings import guarded, settings_of

_TOKENS = 33
_NORMS = {"normalised": (True, None), "no norm": (False, None), "normalised by squares": (False, 2)}


def _parts(moe: MoeLayer, parent: nn.Module) -> RoutingLayer | None:
    """The names of a layer's parts; None where there are others."""
    names = {module: name for name, module in parent.named_children()}
    routers = [names[one] for one in moe.siblings.values() if moe.num_experts in matrix_rows(one)]
    top_k = getattr(parent, "top_k", None)
    if len(routers) != 1 or len(moe.siblings) != 1 or type(top_k) is not int or not 1 <= top_k <= moe.num_experts:
        return None
    return RoutingLayer(routers[0], names[moe.module], Router(top_k))


def _matrix(router: nn.Module, count: int) -> Tensor:
    """[E, H] of a router."""
    return next(p for p in router.parameters() if p.dim() == 2 and p.shape[0] == count)


def _error(parts: RoutingLayer, moe: MoeLayer, parent: nn.Module) -> ProbeError:
    forward, own = parts.make_forward(), type(parent).forward
    top_k = parts.routing.top_k

    # Some routers change what they are given in place, and a probe's inputs are leaves.
    def candidate(self: nn.Module, x: Tensor) -> Tensor:
        return forward(self, x.clone())

    def original(self: Any, x: Tensor) -> Any:
        return own(self, x.clone())

    def batches(copied: nn.Module) -> list[list[Tensor]]:
        matrix = _matrix(copied.get_submodule(parts.router), moe.num_experts)
        x = random_input(_TOKENS, matrix.shape[1], like=copied)
        x = x[clear_choice(x, matrix, top_k)]
        return [[scale * x[None]] for scale in (1.0, 5.0)]

    slices = flat_slices(moe.module, moe.num_experts, moe.num_experts, f"{parts.experts}.")
    return error_of(parent, candidate, batches, original, slices)


def _verdict(moe: MoeLayer, parent: nn.Module) -> tuple[str, RoutingLayer, ProbeError] | str:
    parts = _parts(moe, parent)
    if parts is None:
        return "the layer around it is not one router, experts and a number top_k"
    options: list[tuple[str, RoutingLayer, Callable[[], ProbeError]]] = []
    for words, (by_sum, norm) in _NORMS.items():
        one = replace(parts, routing=replace(parts.routing, norm_topk_prob=by_sum), norm=norm)
        name = f"route (softmax, top {parts.routing.top_k}, {words})"
        options.append((name, one, partial(_error, one, moe, parent)))
    return prove(options)


def find_routing_layer(model: nn.Module, moe: MoeLayer, proven: dict[Any, Any]) -> Claim | Skipped:
    """A claim on the layer around experts, or why it keeps its forward.

    Args:
        proven: verdicts by key, of layers that compute the same function.
    """
    path = moe.path.rpartition(".")[0]
    parent = model.get_submodule(path)
    foreign = (foreign_forward(part) for part in parent.modules())
    other = next((one for one in foreign if one is not None), None)
    if other is not None:
        return Skipped("router", path, UNPROVEN.format(other))
    key = signature_key(parent)
    if key not in proven:
        proven[key] = _verdict(moe, parent)
    verdict = proven[key]
    if isinstance(verdict, str):
        return Skipped("router", path, verdict)
    op, parts, error = verdict
    placed = replace(parts, routing=replace(parts.routing, layer=moe.layer))
    forward = guarded(placed.make_forward(), settings_of(parent))
    return Claim("router", path, parent, op, error, replace_forward(parent, forward))
