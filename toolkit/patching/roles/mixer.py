"""Recurrent mixers: their own forward, with replaced functions for the convolution and the scan.

transformers writes the convolution and the scan of a mixer as functions that a faster kernel can replace. A function is
recognised by its arguments. For a ragged batch the mixer's own forward runs with other functions under those names;
ordinary calls, with caches and padding, run it unchanged.
"""

import builtins
import inspect
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.modules import mixer
from toolkit.numerics import Numerics
from toolkit.patching.claim import Claim, ProbeError, Skipped, replace_forward
from toolkit.patching.conditions import error_of
from toolkit.patching.probe import device_of, random_input, signature_key
from toolkit.patching.search import prove
from toolkit.state.active import forward_context_of, set_forward_context
from toolkit.state.batch import RaggedBatch
from toolkit.state.context import ForwardContext
from toolkit.state.dense import DenseContext

LENGTHS = (5, 9)  # of the probe's sequences
Make = Callable[[int, ForwardContext], Callable[..., Any]]

# (required arguments, excluded arguments, replacement); the first that matches.
_FUNCTIONS: tuple[tuple[set[str], set[str], Make], ...] = (
    ({"rmsnorm_weight", "chunk_size", "dt_bias"}, set(), mixer.declined),
    ({"conv1d_weight", "x_proj_weight", "out_proj_weight", "A"}, set(), mixer.declined),
    ({"query", "key", "value", "g", "beta", "initial_state", "chunk_size"}, set(), mixer.gated_delta_rule),
    ({"hidden_states", "dt", "A", "B", "C", "chunk_size", "initial_states"}, set(), mixer.state_space),
    ({"hidden_states", "dt", "A", "B", "C", "z", "delta_bias", "delta_softplus"}, set(), mixer.selective_scan),
    ({"hidden_states", "weight", "bias", "activation"}, {"conv_state"}, mixer.convolution),
)


def _called(forward: Any) -> dict[str, Any]:
    """Functions of its module that a forward calls by name."""
    found = {name: forward.__globals__.get(name) for name in forward.__code__.co_names}
    return {name: value for name, value in found.items() if inspect.isfunction(value) and not hasattr(builtins, name)}


def _replacements(forward: Any) -> dict[str, Make]:
    found = {}
    for name, function in _called(forward).items():
        arguments = set(inspect.signature(function).parameters)
        for needed, other, make in _FUNCTIONS:
            if needed <= arguments and not other & arguments:
                found[name] = make
                break
    return found


def substituted(forward: Any, replacements: dict[str, Make]) -> Callable[..., Any]:
    """``forward`` that, for a ragged batch, calls the batch's functions instead of those in ``replacements``."""
    inner = inspect.unwrap(forward)
    names = list(inspect.signature(inner).parameters)[1:]
    mask_at = names.index("attention_mask") if "attention_mask" in names else len(names)

    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context = forward_context_of(kwargs)
        if context is None:
            return forward(self, *args, **kwargs)
        if "attention_mask" in kwargs:
            kwargs["attention_mask"] = None  # there is no padding between sequences
        elif len(args) > mask_at:
            args = (*args[:mask_at], None, *args[mask_at + 1 :])
        own = {name: make(self.layer_idx, context) for name, make in replacements.items()}  # type: ignore[arg-type]
        function = types.FunctionType(
            inner.__code__, inner.__globals__ | own, inner.__name__, inner.__defaults__, inner.__closure__
        )
        function.__kwdefaults__ = inner.__kwdefaults__
        return function(self, *args, **kwargs)

    return replaced


def _probe(module: nn.Module, forward: Callable[..., Any]) -> ProbeError:
    """A ragged batch of two sequences against the module's own forward of each."""
    # The first projection that is declared may be the one that takes what the scan returns.
    first = next(child for child in module.modules() if isinstance(child, nn.Linear))
    width = getattr(module, "hidden_size", first.in_features)
    batch = RaggedBatch.from_sequences([[0] * length for length in LENGTHS], device_of(module), share=False)
    context = DenseContext(batch)
    original = type(module).forward

    def separate(self: nn.Module, *sequences: Tensor) -> Tensor:
        return torch.cat([original(self, x) for x in sequences], 1)

    def batched(self: nn.Module, *sequences: Tensor) -> Tensor:
        with set_forward_context(context):
            output: Tensor = forward(self, torch.cat(sequences, 1))
            return output

    def batches(copied: nn.Module) -> list[list[Tensor]]:
        return [[random_input(1, length, width, like=copied) for length in LENGTHS]]

    return error_of(module, batched, batches, separate)


def find(model: nn.Module, numerics: Numerics) -> list[Claim | Skipped]:
    """A claim on every mixer whose convolution and scan are known; the others are skipped."""
    found: list[Claim | Skipped] = []
    proven: dict[Any, Any] = {}
    for path, module in model.named_modules():
        if not any(isinstance(child, nn.Conv1d) for child in module.children()) or not hasattr(module, "layer_idx"):
            continue
        key = signature_key(module)
        if key not in proven:
            forward = type(module).forward
            replacements = _replacements(inspect.unwrap(forward))
            names = {make.__name__ for make in replacements.values()} - {"declined"}
            if not names:
                proven[key] = "its forward calls no convolution or scan of a known kind"
            else:
                function = substituted(forward, replacements)
                op = " + ".join(sorted(name.replace("_", " ") for name in names))
                proven[key] = prove([(op, function, partial(_probe, module, function))])
        verdict = proven[key]
        if isinstance(verdict, str):
            found.append(Skipped("mixer", path, verdict))
        else:
            op, function, error = verdict
            found.append(Claim("mixer", path, module, op, error, replace_forward(module, function)))
    return found
