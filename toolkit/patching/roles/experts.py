"""Experts of MoE layers, as parameters [E, ., .]: two grouped GEMMs with an activation between them.

Most of transformers' classes dispatch through its experts interface, which a setting of the model's config points to
ours, so that no other code takes it for one of transformers' own and changes it (``generate`` does).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import Any

from torch import Tensor, nn

from toolkit.modules.moe_experts import MoeExperts
from toolkit.moe import ExpertLayout
from toolkit.numerics import Numerics
from toolkit.ops.activation import KINDS, plain_kinds
from toolkit.patching import experts_interface
from toolkit.patching.attention_configs import EXPERTS_FIELD, set_implementation
from toolkit.patching.claim import Claim, ProbeError, Skipped, Undo, replace_forward, together
from toolkit.patching.conditions import error_of
from toolkit.patching.probe import signature_key
from toolkit.patching.probe_copy import Slices
from toolkit.patching.roles.flat_experts import find_flat
from toolkit.patching.roles.moe_layers import FEW, MoeLayer, expert_batches, moe_layers
from toolkit.patching.roles.scaled_experts import find_scaled, is_scaled
from toolkit.patching.search import prove
from toolkit.patching.settings import guarded, settings_of


def _slices(module: nn.Module, count: int, parts: MoeExperts) -> Slices:
    """The first ``FEW`` of ``count`` experts, and few columns between their two GEMMs."""
    own = dict(module.named_parameters(recurse=False))
    experts = {name: (0, 1) for name, p in own.items() if p.dim() > 1 and p.shape[0] == count}
    up, down = (2, 1) if parts.layout.transposed else (1, 2)
    inner = own[parts.down].shape[down]
    times = own[parts.up].shape[up] // inner
    columns = {parts.up: (up, times), parts.down: (down, 1)} | ({parts.up_bias: (1, times)} if parts.up_bias else {})
    return Slices.of(count, experts, FEW) | Slices.of(inner, columns)


def _probe(module: nn.Module, count: int, parts: MoeExperts, hidden_size: int) -> ProbeError:
    def batches(copied: nn.Module) -> list[list[Tensor]]:
        return expert_batches(copied, min(count, FEW), hidden_size)

    own = experts_interface.own_forward(module)
    return error_of(module, parts.make_forward(), batches, own, _slices(module, count, parts))


def _layouts(module: nn.Module) -> Iterator[tuple[MoeExperts, int]]:
    """Every layout of the parameters that their shapes allow, with the hidden size."""
    own = dict(module.named_parameters(recurse=False))
    weights = [name for name, p in own.items() if p.dim() == 3]
    norms = [name for name, child in module.named_children() if next(child.parameters(), None) is not None]
    for up, down in permutations(weights, 2):
        for transposed in (False, True):
            first, second = own[up].shape, own[down].shape
            outputs, width = (first[2], first[1]) if transposed else (first[1], first[2])
            inner, back = (second[1], second[2]) if transposed else (second[2], second[1])
            if back != width or outputs not in (inner, 2 * inner):
                continue
            biases = [name for name, p in own.items() if p.dim() == 2]
            for up_bias, down_bias in permutations([*biases, None, None], 2):
                if (up_bias and own[up_bias].shape[1] != outputs) or (down_bias and own[down_bias].shape[1] != width):
                    continue
                used = {up, down, up_bias, down_bias}
                if used >= set(own) and len(norms) < 2:
                    layout = ExpertLayout("", transposed=transposed)
                    yield MoeExperts(up, down, layout, up_bias, down_bias, norms[0] if norms else None), width


def _candidates(module: nn.Module, count: int) -> list[tuple[str, MoeExperts, Callable[[], ProbeError]]]:
    """Layouts by likelihood: those of the usual modules come first, because a probe of large experts is slow."""
    found: list[tuple[str, MoeExperts, Callable[[], ProbeError]]] = []
    for parts, width in dict.fromkeys(_layouts(module)):
        gated = parts.weights(module).gated
        activations = sorted(KINDS if gated else plain_kinds(), key=lambda kind: kind != "silu")
        for position in ("activation", "input"):
            for activation in activations:
                for interleaved in (False, True)[: 1 + gated]:
                    layout = ExpertLayout(activation, position, parts.layout.transposed, interleaved)
                    candidate = replace(parts, layout=layout)
                    found.append((_name(candidate, gated), candidate, partial(_probe, module, count, candidate, width)))
    return found


def _name(parts: MoeExperts, gated: bool) -> str:
    """The name of a layout in the report."""
    layout = parts.layout
    words = [layout.activation, *(["interleaved" if layout.interleaved else "halves"] if gated else ["no gate"])]
    words += ["transposed"] * layout.transposed + ["biases"] * (parts.up_bias is not None)
    words += ["scores at the input"] * (layout.score_position == "input")
    words += ["post_norm"] * (parts.post_norm is not None)
    return f"experts ({', '.join(words)})"


def _verdict(moe: MoeLayer) -> tuple[str, MoeExperts, ProbeError] | str:
    """The layout that the probe confirms, or the skip reason."""
    module = moe.module
    dtypes = {p.dtype for p in module.parameters(recurse=False)}
    if len(dtypes) != 1 or not all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in dtypes):
        given = " and ".join(sorted(map(str, dtypes)))
        return f"its parameters must have one floating-point dtype of 16 bits or more, got {given}"
    options = _candidates(module, moe.num_experts)
    if not options:
        return "its parameters do not have the shapes of two GEMMs with an activation between them"
    return prove(options)


def _install_interface(model: Any) -> Undo:
    before = model.get_experts_implementation()
    model.set_experts_implementation(experts_interface.NAME)
    return partial(model.set_experts_implementation, before)


def find(model: Any, numerics: Numerics) -> list[Claim | Skipped]:
    """A claim on every module of experts whose layout is proven, and one on the model's experts implementation.

    That implementation is set for all modules at once: one that is not proven runs its own code, expert by expert,
    which in bitwise mode is batch-invariant where the implementation that was set before would not be.
    """
    experts_interface.register()
    claims: list[Claim | Skipped] = []
    proven: dict[Any, tuple[str, MoeExperts, ProbeError] | str] = {}
    reached: list[ProbeError] = []
    settable = hasattr(model, "set_experts_implementation") and model._can_set_experts_implementation()
    dispatching = False
    configs: dict[int, Any] = {}
    for moe in moe_layers(model):
        module = moe.module
        if moe.flat:
            claims.append(find_flat(moe, proven))
        if not moe.stacked:
            continue
        key = signature_key(module)
        if is_scaled(moe):
            layer = model.get_submodule(moe.path.rpartition(".")[0])
            claims += find_scaled(model, moe, proven, signature_key(layer))
            continue
        if key not in proven:
            proven[key] = _verdict(moe)
        verdict = proven[key]
        through = settable and experts_interface.dispatches(module)
        dispatching |= through
        if through:
            configs[id(module.config)] = module.config
        if isinstance(verdict, str):
            claims.append(Skipped("experts", moe.path, verdict))
            continue
        op, parts, error = verdict
        settings = settings_of(module, ["recompute_experts"])
        if through:
            reached.append(error)
            settings += (("config._experts_implementation", experts_interface.NAME),)
        forward = guarded(replace(parts, layer=moe.layer).make_forward(), settings)
        claims.append(Claim("experts", moe.path, module, op, error, replace_forward(module, forward)))
    if reached or (dispatching and numerics is Numerics.BITWISE):
        errors = [ProbeError(0.0, 0.0), *reached]
        worst = ProbeError(max(e.forward for e in errors), max(e.backward for e in errors))
        installs = [
            partial(set_implementation, config, EXPERTS_FIELD, experts_interface.NAME) for config in configs.values()
        ]
        install = together(partial(_install_interface, model), *installs)
        claims.insert(0, Claim("experts", "", model, "experts interface", worst, install))
    return claims
