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
from toolkit.modules.dynamic_convolution import dynamic_convolution_forward, is_dynamic_convolution
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
_WITHOUT = {"past_key_values", "conv_mask"}  # the batch stands in for a cache, and there is no padding
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
        for name in _WITHOUT & kwargs.keys():
            kwargs[name] = None
        several = {mixer.convolution: partial(mixer.convolution, part=getattr(self, "conv_idx", 0))}
        own = {name: several.get(make, make)(self.layer_idx, context) for name, make in replacements.items()}  # type: ignore[arg-type]
        function = types.FunctionType(
            inner.__code__, inner.__globals__ | own, inner.__name__, inner.__defaults__, inner.__closure__
        )
        function.__kwdefaults__ = inner.__kwdefaults__
        return function(self, *args, **kwargs)

    return replaced


def _probe(module: nn.Module, forward: Callable[..., Any]) -> ProbeError:
    """A ragged batch of two sequences against the module's own forward of each."""
    # The first projection that is declared may be the one that takes what the scan returns.
    widths = [child.in_features for child in module.modules() if isinstance(child, nn.Linear)]
    widths += [child.in_channels for child in module.modules() if isinstance(child, nn.Conv1d)]
    width = getattr(module, "hidden_size", widths[0])
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


def _dynamic_probe(module: Any, forward: Callable[..., Any]) -> ProbeError:
    """As ``_probe``, of a convolution that takes inputs and what their weights are made of."""
    batch = RaggedBatch.from_sequences([[0] * length for length in LENGTHS], device_of(module), share=False)
    context, original, count = DenseContext(batch), type(module).forward, len(LENGTHS)
    widths = module.static_weight.shape[1], module.weight_proj.in_features

    def separate(self: nn.Module, *given: Tensor) -> Tensor:
        return torch.cat([original(self, *pair) for pair in zip(given[:count], given[count:], strict=True)], 1)

    def batched(self: nn.Module, *given: Tensor) -> Tensor:
        with set_forward_context(context):
            output: Tensor = forward(self, torch.cat(given[:count], 1), torch.cat(given[count:], 1))
            return output

    def batches(copied: nn.Module) -> list[list[Tensor]]:
        return [[random_input(1, length, width, like=copied) for width in widths for length in LENGTHS]]

    return error_of(module, batched, batches, separate)


def has_state(module: nn.Module) -> bool:
    """Whether a module convolves or scans, and knows which layer's state it has."""
    convolves = any(isinstance(child, nn.Conv1d) for child in module.children()) and hasattr(module, "layer_idx")
    return convolves or is_dynamic_convolution(module)


def proven(module: nn.Module) -> Any:
    """What takes the place of the forward of a module with state, or why nothing does."""
    forward = type(module).forward
    if is_dynamic_convolution(module):
        function = dynamic_convolution_forward(forward)
        return prove([("dynamic convolution", function, partial(_dynamic_probe, module, function))])
    replacements = _replacements(inspect.unwrap(forward))
    names = {make.__name__ for make in replacements.values()} - {"declined"}
    if not names:
        return "its forward calls no convolution or scan of a known kind"
    function = substituted(forward, replacements)
    op = " + ".join(sorted(name.replace("_", " ") for name in names))
    return prove([(op, function, partial(_probe, module, function))])


def find(model: nn.Module, numerics: Numerics) -> list[Claim | Skipped]:
    """A claim on every mixer whose convolution and scan are known; the others are skipped."""
    found: list[Claim | Skipped] = []
    verdicts: dict[Any, Any] = {}
    for path, module in model.named_modules():
        if not has_state(module):
            continue
        key = signature_key(module)
        if key not in verdicts:
            verdicts[key] = proven(module)
        verdict = verdicts[key]
        if isinstance(verdict, str):
            found.append(Skipped("mixer", path, verdict))
        else:
            op, function, error = verdict
            found.append(Claim("mixer", path, module, op, error, replace_forward(module, function)))
    return found
