"""Attention layers: through the attention interface, and with a fused forward where the layer has the usual structure.

One setting of a model's config selects the interface for all of its layers, so every layer must call it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import causal_mask_function, eager_mask

from toolkit.errors import first_line
from toolkit.modules.attention import FusedAttention
from toolkit.modules.latent_attention import parts_of
from toolkit.numerics import Numerics
from toolkit.patching import attention_interface
from toolkit.patching.calls import MASK, Call, record_calls
from toolkit.patching.claim import Claim, ProbeError, Skipped, Undo, replace_forward
from toolkit.patching.probe import compare, device_of, probe_copy, random_input, signature_key, with_forward
from toolkit.patching.search import prove
from toolkit.state.active import set_forward_context
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext

ROWS, LENGTH = 2, 7
PROBE_WINDOW = 3  # small enough to mask tokens within the probe


@dataclass(frozen=True)
class Seen:
    """What a layer passed to the attention interface in one call, and what it got back."""

    heads: int
    head_dim: int
    window: int
    softcap: float
    sinks: str | None
    output: Tensor


def _is_attention(module: nn.Module) -> bool:
    return (
        hasattr(module, "is_causal")
        and hasattr(module, "layer_idx")
        and any(getattr(getattr(child, "weight", None), "ndim", 0) == 2 for child in module.children())
    )


class Probe:
    """Runs a probe copy of an attention layer, called as the model calls it, through eager attention and candidates."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        self.copied: Any = probe_copy(module)
        self.call = call
        self.shape = call.arguments[call.hidden].shape
        self.paired = True
        self.seen = self.look()
        if self.seen.window:
            holders: tuple[Any, Any] = (self.copied, self.copied.config)
            for holder in holders:
                if getattr(holder, "sliding_window", None):
                    holder.sliding_window = PROBE_WINDOW

    def look(self) -> Seen:
        """One call with a recording function registered as the interface."""
        calls: list[Seen] = []

        def record(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **kwargs: Any
        ) -> Any:
            mask = kwargs.pop("attention_mask", mask)
            window, softcap = kwargs.get("sliding_window") or 0, kwargs.get("softcap") or 0.0
            given = kwargs.get("s_aux")
            sinks = next((name for name, own in module.named_parameters(recurse=False) if own is given), None)
            output = attention_interface.attention_function(module, query, key, value, mask, **kwargs)
            calls.append(Seen(query.shape[1], query.shape[-1], window, softcap, sinks, output[0]))
            return output

        with _registered("toolkit_probe", record), torch.no_grad():
            self.run("toolkit_probe", None, random_input(*self.shape, like=self.copied))
        if len(calls) != 1:
            raise RuntimeError(f"it must call the attention interface once, got {len(calls)} calls")
        return calls[0]

    @property
    def tables(self) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines that the layer receives, [1 or B, S, D]."""
        given = self.call.arguments.get("position_embeddings")
        return given if isinstance(given, tuple) and len(given) == 2 else None

    def run(self, implementation: str, mask: Any, hidden: Tensor, forward: Any = None, **replaced: Any) -> Tensor:
        self.copied.config._attn_implementation = implementation
        function = with_forward(self.copied, forward or type(self.copied).forward)
        arguments = self.call.with_arguments(**{self.call.hidden: hidden, MASK: mask}, **replaced)
        output = function(**arguments)
        if forward is None:
            self.paired = isinstance(output, tuple)
        elif isinstance(output, tuple) != self.paired:
            raise RuntimeError("it must return a pair of outputs and weights")
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def error(self, forward: Any = None) -> ProbeError:
        """Against eager attention with the mask that transformers made for it."""
        hidden = random_input(*self.shape, like=self.copied)
        given = self.call.arguments.get(MASK)
        return compare(
            lambda x: self.run(attention_interface.NAME, None, x, forward),
            lambda x: self.run("eager", given, x),
            [[hidden]],
            list(self.copied.parameters()),
        )


class _registered:
    """Inside, an attention function is registered under ``name``."""

    def __init__(self, name: str, function: Any) -> None:
        self.name, self.function = name, function

    def __enter__(self) -> None:
        AttentionInterface.register(self.name, self.function)

    def __exit__(self, *_: object) -> None:
        AttentionInterface._global_mapping.pop(self.name, None)


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

        probed = parts(PROBE_WINDOW if probe.seen.window else 0).make_forward()
        op = f"attention (fused, {'interleaved' if interleaved else 'half'} rotary)"
        options.append((op, parts(probe.seen.window).make_forward(), lambda probed=probed: probe.error(probed)))
    return options


LENGTHS = (LENGTH, 4)  # of the sequences that latent attention is probed with


def _latent_options(module: nn.Module, probe: Probe) -> list[Any]:
    """The latent forward handles ragged batches only: one batch of two sequences against eager attention on each."""
    options = []
    for interleaved in (False, True):
        parts = parts_of(module, interleaved)
        if parts is None or probe.tables is None or probe.seen.window or probe.seen.softcap or probe.seen.sinks:
            return []
        forward = parts.make_forward(type(module).forward)
        op = f"latent attention ({'interleaved' if interleaved else 'half'} rotary)"
        options.append((op, forward, lambda forward=forward: _latent_error(probe, forward)))
    return options


def _latent_error(probe: Probe, forward: Any) -> ProbeError:
    assert probe.tables is not None
    cos, sin = (table[:1] for table in probe.tables)
    batch = RaggedBatch.from_sequences([[0] * length for length in LENGTHS], device_of(probe.copied), share=False)
    context = DenseContext(batch)
    batched_tables = tuple(torch.cat([table[:, :length] for length in LENGTHS], 1) for table in (cos, sin))

    def batched(*sequences: Tensor) -> Tensor:
        with set_forward_context(context):
            run = with_forward(probe.copied, forward)
            output: Tensor = run(torch.cat(sequences, 1), position_embeddings=batched_tables)[0]
            return output

    def separate(*sequences: Tensor) -> Tensor:
        outputs = []
        for x in sequences:
            length = x.shape[1]
            mask = eager_mask(
                1, length, length, mask_function=causal_mask_function, dtype=torch.float32, device=x.device
            )
            outputs.append(probe.run("eager", mask, x, position_embeddings=(cos[:, :length], sin[:, :length])))
        return torch.cat(outputs, 1)

    inputs = [random_input(1, length, probe.shape[-1], like=probe.copied) for length in LENGTHS]
    return compare(batched, separate, [inputs], list(probe.copied.parameters()))


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
            fused = prove(_fused_options(module, probe))
            verdicts[key] = probe, error, fused if isinstance(fused, tuple) else prove(_latent_options(module, probe))
        _, error, fused = verdicts[key]
        worst = ProbeError(max(worst.forward, error.forward), max(worst.backward, error.backward))
        if isinstance(fused, tuple):
            op, forward, fused_error = fused
            claims.append(Claim("attention", path, module, op, fused_error, replace_forward(module, forward)))
    return [Claim("attention", "", model, "attention interface", worst, partial(_install_interface, model)), *claims]
