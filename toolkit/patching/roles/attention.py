"""Attention layers: through the attention interface, and with a fused forward where the layer has the usual structure.

One setting of a model's config selects the interface for all of its layers, so every layer must call it.
"""

from functools import partial
from typing import Any

from torch import nn

from toolkit.errors import first_line
from toolkit.modules.attention import FusedAttention
from toolkit.modules.latent_attention import parts_of
from toolkit.modules.row_positions import row_positions_forward
from toolkit.numerics import Numerics
from toolkit.patching import attention_interface
from toolkit.patching.attention_interface import weights_wanted
from toolkit.patching.attention_probe import FAR, LENGTH, PROBE_WINDOW, ROWS, Probe
from toolkit.patching.calls import record_calls
from toolkit.patching.claim import Claim, ProbeError, Skipped, Undo, replace_forward
from toolkit.patching.probe import signature_key
from toolkit.patching.search import prove


def _is_attention(module: nn.Module) -> bool:
    return (
        hasattr(module, "is_causal")
        and hasattr(module, "layer_idx")
        and any(getattr(getattr(child, "weight", None), "ndim", 0) == 2 for child in module.children())
    )


def _fused_options(module: nn.Module, probe: Probe) -> list[Any]:
    names = {name for name, _ in module.named_children()}
    out = next((name for name in ("o_proj", "out_proj", "dense") if name in names), None)
    if not {"q_proj", "k_proj", "v_proj"} <= names or out is None or probe.tables is None or probe.call.positional > 1:
        return []
    q_norm, k_norm = ("q_norm" if "q_norm" in names else None), ("k_norm" if "k_norm" in names else None)
    options = []
    for interleaved in (False, True):

        def parts(window: int, interleaved: bool = interleaved) -> FusedAttention:
            seen = probe.seen
            return FusedAttention(
                "q_proj",
                "k_proj",
                "v_proj",
                out,
                q_norm,
                k_norm,
                seen.sinks,
                interleaved,
                seen.head_dim,
                window,
                seen.softcap,
            )

        own = type(module).forward
        probed = parts(PROBE_WINDOW if probe.seen.window else 0).make_forward(own)
        op = f"attention (fused, {'interleaved' if interleaved else 'half'} rotary)"
        fused = parts(probe.seen.window).make_forward(own, weights_wanted)
        options.append((op, fused, partial(probe.forward_error, probed)))
    return options


def _latent_options(module: nn.Module, probe: Probe) -> list[Any]:
    """The latent forward handles ragged batches only."""
    options = []
    for interleaved in (False, True):
        parts = parts_of(module, interleaved)
        if parts is None or probe.tables is None or probe.seen.window or probe.seen.softcap or probe.seen.sinks:
            return []
        forward = parts.make_forward(type(module).forward)
        op = f"latent attention ({'interleaved' if interleaved else 'half'} rotary)"
        options.append((op, forward, partial(probe.ragged_error, forward)))
    return options


def _verdict(module: nn.Module, probe: Probe) -> tuple[str, Any, ProbeError] | str:
    """What takes the place of the layer's forward, or why nothing has to.

    Raises:
        RuntimeError: a ragged batch would have other positions in it.
    """
    if probe.reads_cache:
        forward = row_positions_forward(type(module).forward)
        op = "attention (positions of its rows)"
        found = prove([(op, forward, partial(probe.ragged_error, forward, (FAR, 3 * FAR)))])
        if isinstance(found, str):
            raise RuntimeError(f"it counts positions from its cache's length, and {found}")
        return found
    found = prove(_fused_options(module, probe))
    return found if isinstance(found, tuple) else prove(_latent_options(module, probe))


def _install_interface(model: Any) -> Undo:
    before = model.config._attn_implementation
    model.set_attn_implementation(attention_interface.NAME)
    return partial(model.set_attn_implementation, before)


def find(model: Any, numerics: Numerics) -> list[Claim | Skipped]:
    """One claim on the model (its attention implementation) and one on each layer whose forward can be fused."""
    attention_interface.register()
    layers = [(path, module) for path, module in model.named_modules() if _is_attention(module)]
    if not layers:
        return []
    if not model._can_set_attn_implementation():
        return [
            Skipped("attention", path, "it does not dispatch through the attention interface") for path, _ in layers
        ]
    try:
        calls = record_calls(model, [module for _, module in layers], ROWS, LENGTH, PROBE_WINDOW)
    except Exception as problem:
        return [
            Skipped("attention", path, f"the model's forward failed: {first_line(problem, with_class=True)}")
            for path, _ in layers
        ]
    layers = [
        (path, module) for path, module in layers if calls[module]
    ]  # cross-attention to another model's states is not called
    twice = next((path for path, module in layers if len(calls[module]) > 1), None)
    if twice is not None:
        return [Skipped("attention", twice, "the model calls it more than once in a forward")]
    indices = [module.layer_idx for _, module in layers]
    if len(set(indices)) != len(indices) or None in indices:
        return [Skipped("attention", path, "its layer_idx is missing or shared") for path, _ in layers]
    verdicts: dict[Any, tuple[Probe, ProbeError, Any]] = {}
    claims: list[Claim | Skipped] = []
    worst = ProbeError(0.0, 0.0)
    for path, module in layers:
        (call,) = calls[module]
        key = signature_key(module), tuple(sorted(name for name, value in call.arguments.items() if value is not None))
        if key not in verdicts:
            try:
                probe = Probe(module, call)
                error = probe.error()
            except Exception as problem:
                why = first_line(problem, with_class=True)
                reason = f"its probe through the attention interface, which has no mask, failed: {why}"
                return [Skipped("attention", path, reason)]
            if not error.passes():
                return [Skipped("attention", path, f"the interface changes it: probe error {error.worst():.1e}")]
            try:
                verdicts[key] = probe, error, _verdict(module, probe)
            except Exception as problem:
                return [Skipped("attention", path, first_line(problem))]
        _, error, fused = verdicts[key]
        worst = ProbeError(max(worst.forward, error.forward), max(worst.backward, error.backward))
        if isinstance(fused, tuple):
            op, forward, fused_error = fused
            claims.append(Claim("attention", path, module, op, fused_error, replace_forward(module, forward)))
    return [Claim("attention", "", model, "attention interface", worst, partial(_install_interface, model)), *claims]
