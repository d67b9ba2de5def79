"""How a model calls its layers, recorded during one forward over a few tokens.

What a layer receives beside its hidden states (rotary tables, masks, arguments that an architecture adds) is then known
and not guessed from names.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from toolkit.patching.adapters import vocabulary_size
from toolkit.patching.attention_configs import eager_modules
from toolkit.patching.eval_mode import eval_mode
from toolkit.patching.mask_borders import Shows, kept_functions
from toolkit.patching.probe import device_of, generator
from toolkit.patching.skeleton import HIDDEN, skeleton
from toolkit.patching.without_media import text_arguments

MASK = "attention_mask"
T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a module, by name.

    Args:
        arguments: floating-point tensors are float32.
        positional: number of arguments that were given without a name.
        given: as they were, in the types of the model; None where nobody called it.
        shows: the function that its mask was made of, in the windows and chunks of the configuration; None where
            transformers made none.
    """

    arguments: dict[str, Any]
    positional: int
    given: dict[str, Any] | None = None
    shows: Shows | None = None

    @property
    def hidden(self) -> str:
        """The name of the argument that is the hidden states."""
        return next(name for name in HIDDEN if name in self.arguments)

    def within(self, dtype: torch.dtype | None) -> "Call":
        """The call in a model of 16 bits, whose tables may be float32 all the same; itself for None."""
        if dtype is None:
            return self
        return Call(cast_floating(self.arguments, dtype) if self.given is None else self.given, self.positional)

    def with_arguments(self, **replaced: Any) -> dict[str, Any]:
        """The arguments with some replaced; names that the module does not take are ignored.

        Lists and mappings are new ones: a layer may write into them (keys for later layers, with their graph).
        """
        given = self.arguments | {name: value for name, value in replaced.items() if name in self.arguments}
        return {name: map_tensors(value, lambda tensor: tensor) for name, value in given.items()}


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """``function`` of a tensor, also inside tuples, lists and mappings, which are new ones; anything else as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(map_tensors(item, function) for item in value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, MutableMapping):
        new = copy.copy(value)
        for name, item in value.items():
            new[name] = map_tensors(item, function)
        return new
    return value


def cast_floating(arguments: T, dtype: torch.dtype) -> T:
    """Arguments with floating-point tensors in another type, within its range."""
    limits = torch.finfo(dtype)

    def cast(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        narrower = limits.max < torch.finfo(tensor.dtype).max
        return (tensor.clamp(limits.min, limits.max) if narrower else tensor).to(dtype)

    cast_of: T = map_tensors(arguments, cast)
    return cast_of


def copy_of(tensor: Tensor) -> Tensor:
    """A copy without a graph."""
    return tensor.detach().clone()


def float32_copy(tensor: Tensor) -> Tensor:
    """A copy, of a floating-point tensor in float32."""
    return tensor.detach().float().clone() if tensor.is_floating_point() else tensor.detach().clone()


@contextmanager
def _replaced(config: Any, values: dict[str, Any]) -> Iterator[None]:
    """Inside, fields that ``config`` has have other values."""
    before = {name: getattr(config, name) for name in values if getattr(config, name, None)}
    try:
        for name in before:
            setattr(config, name, values[name])
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextmanager
def as_in_evaluation(model: Any) -> Iterator[None]:
    """Inside, a forward of ``model`` computes as in evaluation, without gradients, and leaves its weights as they are.

    bitsandbytes repacks quantised weights for good in a forward that needs no gradient, and repacked ones give wrong
    gradients on a CPU: of a model with such weights the hidden states need gradients.
    """
    with torch.no_grad(), eval_mode(model), ExitStack() as stack:
        if not all(parameter.is_floating_point() for parameter in model.parameters()):
            embedding = model.get_input_embeddings()
            stack.callback(
                embedding.register_forward_hook(lambda *call: call[-1].detach().requires_grad_().clone()).remove
            )
            stack.enter_context(torch.enable_grad())
        yield


def record_calls(
    model: Any, modules: Sequence[nn.Module], rows: int, length: int, window: int
) -> dict[nn.Module, list[Call]]:
    """Every call of ``modules`` in the model's own eager forward over ``rows`` sequences of ``length`` tokens.

    It is a forward of the model's ``skeleton``, a layer of each kind: a layer that is left out is called as the one
    that stands for it. Where layers cannot be copied, it is a forward of the model.

    Args:
        window: sliding window and chunk size of the configuration during this forward, so that masks cut off tokens
            within ``length``.
    """
    paths = {module: path for path, module in model.named_modules()}
    try:
        copied = skeleton(model)
        copies = {module: copied.get_submodule(paths[module]) for module in modules}
        found = _with_masks(copied, list(dict.fromkeys(copies.values())), rows, length, window)
    except Exception:  # a library's layers that cannot be copied, or layers that cannot be left out
        return _with_masks(model, modules, rows, length, window)
    return {module: found[copies[module]] for module in modules}


def _with_masks(
    model: Any, modules: Sequence[nn.Module], rows: int, length: int, window: int
) -> dict[nn.Module, list[Call]]:
    """The calls with the functions of masks by the model's own configuration, which a second forward makes."""
    short, real = (_record(model, modules, rows, length, size) for size in (window, None))
    return {
        module: [replace(one, shows=other.shows) for one, other in zip(calls, real[module], strict=True)]
        for module, calls in short.items()
    }


def _record(
    model: Any, modules: Sequence[nn.Module], rows: int, length: int, window: int | None
) -> dict[nn.Module, list[Call]]:
    device = device_of(model)
    vocabulary = vocabulary_size(model)
    source = generator(device, 7)
    ids = torch.randint(min(vocabulary, 97), (rows, length), generator=source, device=device)
    calls: dict[nn.Module, list[Call]] = {module: [] for module in modules}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(type(module).forward)
        named = dict(list(signature.bind(module, *args, **kwargs).arguments.items())[1:])
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                named |= named.pop(parameter.name, {})
        full, given = (
            {name: map_tensors(value, kind) for name, value in named.items()} for kind in (float32_copy, copy_of)
        )
        mask = named.get(MASK)
        shows = masks[id(mask)][1] if id(mask) in masks else None
        calls[module].append(Call(full, len(args), given, shows))

    configs = {id(one): one for one in (model.config, model.config.get_text_config())}.values()
    with as_in_evaluation(model), eager_modules(model), ExitStack() as stack:
        masks = stack.enter_context(kept_functions()) if window is None else {}
        for config in configs if window is not None else ():
            stack.enter_context(_replaced(config, {"sliding_window": window, "attention_chunk_size": window}))
        for module in modules:
            stack.callback(module.register_forward_pre_hook(record, with_kwargs=True).remove)
        model(input_ids=ids, use_cache=False, **text_arguments(model, ids))
    return calls
