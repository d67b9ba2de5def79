"""Attention layers that call no attention function, or one that the interface does not prove: found by what they do.

One forward of the model shows which modules multiply queries by keys. A probe copy of each kind is called as the model
calls it, once recorded (``patching/written_trace.py``), which gives a ``Plan`` of its masks, scale and biases; and then
with the ``Plan``, which must agree, gradients included.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import first_line
from toolkit.modules.attention_scores import UnknownStep
from toolkit.modules.row_positions import RowPositions, row_positions_forward
from toolkit.modules.written_attention import Plan, Watch, written_forward
from toolkit.numerics import Numerics
from toolkit.patching.adapters import vocabulary_size
from toolkit.patching.attention_configs import EXPERTS_FIELD, eager_modules
from toolkit.patching.attention_probe import CACHE, FAR
from toolkit.patching.cache_windows import cache_window
from toolkit.patching.calls import as_in_evaluation, copy_of, float32_copy, map_tensors
from toolkit.patching.claim import Claim, ProbeError, Skipped, Undo, replace_forward
from toolkit.patching.conditions import UNIT, Condition, Trial, drop_nothing, worst_error
from toolkit.patching.instance_forward import UNPROVEN, foreign_forward
from toolkit.patching.mask_borders import CAUSAL, CHUNKS, WINDOWS, Shows, border_reason, kept_functions
from toolkit.patching.probe import device_of, generator, random_input, signature_key
from toolkit.patching.ragged_call import MASKS_OF_BATCH, register_masks
from toolkit.patching.without_media import text_arguments
from toolkit.patching.written_trace import TraceWatch
from toolkit.state.active import set_forward_context
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext

LENGTH = 13
FAR_LENGTH = 300  # beyond local windows that are built into buffers, and beyond what bfloat16 counts to
LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class _Near:
    """A call of a layer over few tokens, and the function that its mask was made of, if there is one."""

    arguments: Arguments
    shows: Shows | None


class _Found(Watch):
    """Notes the module in whose own code each attention of a forward begins; computes nothing else than the model."""

    def __init__(self, length: int, masks: Mapping[int, tuple[Tensor, Shows]]) -> None:
        super().__init__(length)
        self.masks = masks
        self.running: list[tuple[nn.Module, Arguments]] = []
        self.calls: list[tuple[nn.Module, _Near]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.running and self.begins(func, args, kwargs or {}):
            module, arguments = self.running[-1]
            if not self.calls or self.calls[-1][0] is not module:
                given = [
                    self.masks[id(one)][1] for one in (*arguments[0], *arguments[1].values()) if id(one) in self.masks
                ]
                self.calls.append((module, _Near(map_tensors(arguments, copy_of), given[0] if given else None)))
        return func(*args, **(kwargs or {}))


class _Enough(Exception):
    """Ends a forward when the calls that were wanted are known."""


def _run(model: Any, length: int) -> None:
    device = device_of(model)
    ids = torch.randint(min(vocabulary_size(model), 97), (1, length), generator=generator(device, 7), device=device)
    with as_in_evaluation(model), eager_modules(model, [EXPERTS_FIELD]):
        model(input_ids=ids, use_cache=False, **text_arguments(model, ids))


def _attention_calls(model: Any) -> list[tuple[nn.Module, _Near]]:
    """Modules that multiply queries by keys in their own code, in order, with the call."""

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        watch.running.append((module, (args, kwargs)))

    def leave(*_: Any) -> None:
        watch.running.pop()

    with ExitStack() as stack:
        watch = _Found(LENGTH, stack.enter_context(kept_functions()))
        for module in model.modules():
            if not isinstance(module, nn.ModuleList):
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        with watch:
            _run(model, LENGTH)
    return watch.calls


def _far_length(config: Any) -> int:
    limits = [value for name in LIMITS if isinstance(value := getattr(config, name, None), int) and value > 0]
    return min([FAR_LENGTH, *limits])


def _larger(holder: Any, size: int) -> dict[str, int]:
    """The windows of a configuration or layer that are larger than ``size``, by name."""
    values = {name: getattr(holder, name, None) for name in WINDOWS}
    return {name: value for name, value in values.items() if type(value) is int and value > size}


@contextmanager
def _windows(holders: Iterable[Any], size: int) -> Iterator[int]:
    """Inside, the windows of the ``holders`` that are larger have this size; theirs by now, 0 where there are none.

    Raises:
        UnknownStep: there are several of them, which could not be told apart.
    """
    before = [(holder, name, value) for holder in holders for name, value in _larger(holder, size).items()]
    known = {value for _, _, value in before}
    if len(known) > 1:
        raise UnknownStep(f"its windows have several sizes: {sorted(known)}")
    try:
        for holder, name, _ in before:
            setattr(holder, name, size)
        yield max(known, default=0)
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def _far_calls(model: Any, wanted: Sequence[nn.Module], length: int) -> dict[nn.Module, Arguments]:
    """Arguments of the first call of each of ``wanted`` in a forward over ``length`` tokens; it runs no further."""
    calls: dict[nn.Module, Arguments] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[module] = map_tensors((args, kwargs), float32_copy)
        if len(calls) == len(wanted):
            raise _Enough

    with ExitStack() as stack:
        for module in wanted:
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        with suppress(_Enough):
            _run(model, length)
    return calls


def _with_hidden(arguments: Arguments, length: int, hidden: Tensor | None = None) -> tuple[Arguments, torch.Size]:
    """The arguments with ``hidden`` in place of the hidden states [1, length, W], and the shape of those."""
    args, kwargs = arguments
    found = [
        one for one in (*args, *kwargs.values())
        if isinstance(one, Tensor) and one.is_floating_point() and one.dim() == 3 and one.shape[1] == length
    ]  # fmt: skip
    if not found:
        raise UnknownStep("its hidden states are not among its arguments")

    def replaced(one: Any) -> Any:
        same = isinstance(one, Tensor) and one.shape == found[0].shape and torch.equal(one, found[0])
        return hidden if same and hidden is not None else one

    return (tuple(map(replaced, args)), {name: replaced(one) for name, one in kwargs.items()}), found[0].shape


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return first


@dataclass(frozen=True)
class _Far:
    """Calls over many tokens, in which the windows of the configuration that are larger than ``size`` have that.

    Args:
        real: what those windows are; 0 where none is larger.
    """

    size: int
    real: int
    calls: dict[nn.Module, Arguments]


def _plans(
    copied: nn.Module, own: Callable[..., Any], arguments: Arguments, length: int, size: int
) -> tuple[list[Plan], int]:
    """As a call over ``length`` tokens shows them, in which larger windows of the layer have ``size``, too; theirs."""
    _, shape = _with_hidden(arguments, length)
    (args, kwargs), _ = _with_hidden(arguments, length, random_input(*shape, like=copied))
    holders = {id(one): one for part in copied.modules() for one in (part, part.__dict__.get("config"))}
    with _windows(holders.values(), size) as real, torch.no_grad(), TraceWatch(length) as watch:
        output = _first(own(copied, *args, **kwargs))
    if not isinstance(output, Tensor) or not watch.traces:
        raise UnknownStep("its scores do not meet its values in its own code")
    return [trace.plan() for trace in watch.traces], real


def _unshortened(plan: Plan, other: Plan, sizes: tuple[int, int], real: int) -> Plan:
    """The plan of a layer whose windows are as they are: ``real`` where those of two calls were both of ``sizes``.

    Raises:
        UnknownStep: a window changes with the configuration's, and is another.
    """
    if plan.window == other.window:
        return plan
    if (plan.window, other.window) != sizes:
        raise UnknownStep(f"its window is {plan.window} where those of the configuration are {sizes[0]}")
    return replace(plan, window=real)


def _counts(copied: nn.Module, own: Callable[..., Any], arguments: Arguments) -> bool:
    """Whether the layer counts positions from the length of its cache."""
    if not {"get_seq_length", "get_query_offset"} & set(inspect.unwrap(own).__code__.co_names):
        return False
    args, kwargs = arguments
    with torch.no_grad():
        near, far = (_first(own(copied, *args, **{**kwargs, CACHE: RowPositions(past)})) for past in (0, FAR))
    return not torch.equal(near, far)


def _forward(own: Callable[..., Any], layer: int, plans: Sequence[Plan], counts: bool) -> Callable[..., Any]:
    forward = written_forward(own, layer, plans)
    return row_positions_forward(forward) if counts else forward


def _trial(
    copied: nn.Module, own: Callable[..., Any], forward: Callable[..., Any], arguments: Arguments, past: int
) -> Trial:
    """Of ``forward`` in a batch of one sequence after ``past`` tokens, against the layer's own."""
    _, shape = _with_hidden(arguments, LENGTH)
    batch = RaggedBatch.from_sequences([[0] * LENGTH], device_of(copied), share=False)
    context = DenseContext(replace(batch, positions=batch.positions + past))

    def run(function: Callable[..., Any], hidden: Tensor, **cache: Any) -> Tensor:
        (args, kwargs), _ = _with_hidden(arguments, LENGTH, hidden)
        return _first(function(copied, *args, **{**kwargs, **cache}))

    def alone(hidden: Tensor) -> Tensor:
        return run(own, hidden, **({CACHE: RowPositions(past)} if past else {}))

    def batched(hidden: Tensor) -> Tensor:
        with set_forward_context(context):
            return run(forward, hidden)

    return Trial(batched, alone, [[random_input(*shape, like=copied)]])


def _prove(
    module: nn.Module, near: Arguments, far: Sequence[_Far], far_length: int
) -> tuple[list[Plan], bool, ProbeError]:
    """The plans of a layer, whether it counts positions from its cache's length, and the probe error.

    Args:
        far: twice, with windows of two sizes: a window that follows the configuration's is as large as it.
    """
    own = type(module).forward
    copied, full = UNIT.copy_of(module), map_tensors(near, float32_copy)
    (first, windows), (second, _) = (_plans(copied, own, one.calls[module], far_length, one.size) for one in far)
    sizes = far[0].size, far[1].size
    if len({windows, far[0].real} - {0}) > 1:
        raise UnknownStep(f"its window is {windows} where that of the configuration is {far[0].real}")
    real = windows or far[0].real
    plans = [_unshortened(one, other, sizes, real) for one, other in zip(first, second, strict=True)]
    counts = _counts(copied, own, full)
    forward = _forward(own, 0, plans, counts)

    def build(source: nn.Module, condition: Condition) -> tuple[nn.Module, Iterator[Trial]]:
        trying = condition.copy_of(source)
        drop_nothing(trying)
        arguments = full if condition.dtype is None else near
        return trying, (_trial(trying, own, forward, arguments, past) for past in ((0, FAR) if counts else (0,)))

    error = worst_error(module, build)
    if not error.passes():
        raise UnknownStep(
            f"attention as its masks and biases say is not it: probe error {error.worst():.1e}{error.where}"
        )
    return plans, counts, error


def _check_borders(shows: Shows | None, plan: Plan, config: Any, device: torch.device) -> None:
    """Raise UnknownStep where a mask is neither a plan's nor plain causal: the layer's code may have a window, too."""
    if shows is None:
        return
    reason = border_reason(shows, plan.window, config, device, CHUNKS if plan.chunked else CAUSAL)
    if reason is not None and (not plan.window or border_reason(shows, 0, config, device) is not None):
        raise UnknownStep(reason)


def find(model: Any, numerics: Numerics, first_layer: int = 0) -> list[Claim | Skipped]:
    """A claim on each layer that writes its attention out, and one on the model, whose masks the batch takes over.

    Args:
        first_layer: index of the state of the first layer without an index.
    """
    try:
        calls = _attention_calls(model)
    except Exception as problem:
        return [Skipped("attention", "", f"the model's forward failed: {first_line(problem, with_class=True)}")]
    paths = {module: path for path, module in model.named_modules()}
    modules = [module for module, _ in calls]
    if len(set(modules)) != len(modules):
        twice = next(module for module in modules if modules.count(module) > 1)
        return [Skipped("attention", paths[twice], "the model calls it more than once in a forward")]
    for module in modules:
        other = foreign_forward(module)
        if other is not None:
            return [Skipped("attention", paths[module], UNPROVEN.format(other))]
    keys = {module: signature_key(module) for module in modules}
    representative = {key: module for module, key in reversed(keys.items())}
    config = model.config.get_text_config()
    far_length = _far_length(config)
    proven: dict[Any, tuple[list[Plan], bool, ProbeError]] = {}
    claims: list[Claim | Skipped] = []
    layer = first_layer
    far: list[_Far] = []
    try:
        for size in (far_length // 2, far_length // 2 - 1):
            with _windows([config], size) as real:
                again = far and not real
                made = far[0].calls if again else _far_calls(model, list(representative.values()), far_length)
                far.append(_Far(size, real, made))
    except Exception as problem:
        return [Skipped("attention", "", f"the model's forward failed: {first_line(problem, with_class=True)}")]
    for module, near in calls:
        key = keys[module]
        try:
            if key not in proven:
                proven[key] = _prove(representative[key], near.arguments, far, far_length)
            for plan in proven[key][0]:
                _check_borders(near.shows, plan, config, device_of(module))
        except Exception as problem:
            text = first_line(problem, with_class=not isinstance(problem, UnknownStep))
            return [Skipped("attention", paths[module], f"it is not attention in a known form: {text}")]
        plans, counts, error = proven[key]
        kept = cache_window(config, getattr(module, "layer_idx", None))
        if kept and any(not 0 < plan.window <= kept for plan in plans):
            reason = f"its masks show more than the {kept} tokens that its cache keeps"
            return [Skipped("attention", paths[module], f"{reason}: generate() and the forward differ")]
        forward = _forward(type(module).forward, layer, plans, counts)
        layer += len(plans)
        op = f"attention (its own forward, {plans[0]})"
        claims.append(Claim("attention", paths[module], module, op, error, replace_forward(module, forward)))
    if not claims:
        return []
    return [Claim("attention", "", model, MASKS_OF_BATCH, ProbeError(0.0, 0.0), _install_masks), *claims]


def _install_masks() -> Undo:
    register_masks()
    return _nothing


def _nothing() -> None:
    """Nothing to undo: the mask functions are others only during a forward over a ragged batch."""
