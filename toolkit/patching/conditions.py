"""The conditions under which a module and a candidate for its forward must agree. Every role's proof runs over them.

Modules differ where a probe does not look: at parameters of their real scale, in training mode, in 16 bits.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.patching.claim import ProbeError
from toolkit.patching.probe import compare, distance, tensors_of, with_forward
from toolkit.patching.probe_copy import WHOLE, Slices, probe_copy

Batches = Callable[[nn.Module], Sequence[Sequence[Tensor]]]
"""Inputs of a probe copy, float32."""


@dataclass(frozen=True)
class Condition:
    """One way to run a probe.

    Args:
        name: how a report calls it.
        own_values: with the module's own parameters instead of random ones of unit scale.
        training: in training mode.
        dtype: a 16-bit type, in which the candidate must be as close to the module's float32 result as the module is;
            None is float32, in which outputs and gradients must agree.
    """

    name: str
    own_values: bool = False
    training: bool = False
    dtype: torch.dtype | None = None

    def copy_of(self, module: nn.Module, slices: Slices = WHOLE) -> nn.Module:
        """A probe copy of ``module`` as the condition asks for it."""
        copied = probe_copy(module, slices, self.own_values, None if self.dtype else torch.float32)
        return copied.train(self.training)


UNIT = Condition("")
OWN = Condition(" with its own parameters in training mode", own_values=True, training=True)
EXACT = Condition(" in float32", own_values=True)
"""What the one in 16 bits is measured against."""


def conditions_of(module: nn.Module) -> list[Condition]:
    """Those of a module: the one in 16 bits where it has such parameters, and in bfloat16 where it has none."""
    parameters = list(module.parameters())
    dtypes = [p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize == 2]
    narrow = dtypes[0] if dtypes else torch.bfloat16 if not parameters else None
    found = [UNIT, OWN]
    if narrow is not None:
        found.append(Condition(f" in {str(narrow).removeprefix('torch.')}", own_values=True, dtype=narrow))
    return found


@dataclass(frozen=True)
class Trial:
    """One comparison of a candidate with what the module itself computes of the same inputs.

    Args:
        candidate, original: functions of the inputs, of one probe copy.
        inputs: float32, several of each; in 16 bits they are rounded.
        name: how a report calls it, behind the condition.
        gradients: False compares outputs alone.
    """

    candidate: Callable[..., Any]
    original: Callable[..., Any]
    inputs: Sequence[Sequence[Tensor]]
    name: str = ""
    gradients: bool = True


Build = Callable[[nn.Module, Condition], tuple[nn.Module, Iterable[Trial]]]
"""Of a module and a condition: a probe copy, and the trials on it, which may be made one by one."""


def worst_error(module: nn.Module, build: Build, conditions: Sequence[Condition] | None = None) -> ProbeError:
    """The worst error of ``build``'s trials under every condition, up to the first that fails.

    In 16 bits the truth is what the original computes in float32 of the copy's numbers: a copy of the copy, whose
    trials are in the same order.

    Args:
        conditions: None for ``conditions_of`` the module.
    """
    worst = ProbeError(0.0, 0.0)
    for condition in conditions_of(module) if conditions is None else conditions:
        if worst.passes():
            worst = _error_under(condition, module, build, worst)
    return worst


def _error_under(condition: Condition, module: nn.Module, build: Build, worst: ProbeError) -> ProbeError:
    """``worst`` or what is worse under one condition, whose copies are freed at the end."""
    copied, trials = build(module, condition)
    exact: Iterable[Trial | None] = repeat(None) if condition.dtype is None else build(copied, EXACT)[1]
    for trial, truth in zip(trials, exact):
        if condition.dtype is None or truth is None:
            parameters = list(copied.parameters())
            error = compare(trial.candidate, trial.original, trial.inputs, parameters, trial.gradients)
        else:
            functions = trial.candidate, trial.original, truth.original
            error = narrow_error(*functions, trial.inputs, condition.dtype)
        worst = worst.worse(error, f"{condition.name}{trial.name}")
        if not worst.passes():
            break
    return worst


def error_of(
    module: nn.Module,
    candidate: Callable[..., Any],
    batches: Batches,
    own: Callable[..., Any] | None = None,
    slices: Slices = WHOLE,
) -> ProbeError:
    """The worst error of ``candidate`` against the module's forward under every condition, up to the first that fails.

    Args:
        candidate: a forward, whose first argument is the module.
        own: the forward that it is compared with; None is the module's.
        slices: of the probe copies. A module that fails on slices of its parameters is probed as a whole.
    """
    original = own or type(module).forward

    def build(source: nn.Module, condition: Condition) -> tuple[nn.Module, list[Trial]]:
        copied = condition.copy_of(source, slices if source is module else WHOLE)
        inputs = batches(copied)[: None if condition is UNIT else 1]
        ready: Callable[..., Any] = _seeded if copied.training else lambda function: function
        got, expected = (ready(with_forward(copied, one)) for one in (candidate, original))
        return copied, [Trial(got, expected, inputs)]

    if slices is WHOLE:
        return worst_error(module, build)
    first = [build(module, UNIT)]
    if not _runs(first[0][1][0]):
        return error_of(module, candidate, batches, own)
    return worst_error(module, lambda *given: first.pop() if given[1] is UNIT else build(*given))


def _seeded(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which sees the same random numbers in every call."""

    def run(*inputs: Tensor) -> Any:
        devices = [x.device for x in inputs if x.device.type == "cuda"][:1]
        with torch.random.fork_rng([device.index or 0 for device in devices]):
            for source in (
                torch.default_generator,
                *(torch.cuda.default_generators[one.index or 0] for one in devices),
            ):
                source.manual_seed(0)
            return function(*inputs)

    return run


def drop_nothing(copied: nn.Module) -> None:
    """From now on no module of a probe copy drops anything in training mode: two kernels never drop the same."""
    for part in copied.modules():
        for name, value in part.__dict__.items():
            if isinstance(value, float) and ("dropout" in name or (name == "p" and isinstance(part, nn.Dropout))):
                part.__dict__[name] = 0.0


def _runs(trial: Trial) -> bool:
    try:
        with torch.no_grad():
            trial.original(*trial.inputs[0])
    except Exception:
        return False
    return True


# In units of the dtype's epsilon, relative norms. One rounding is 0.2 of it: a result that is rounded once more than
# the module's is as good as that, one that is computed in the narrow type is not. A layer's own result is within a few.
_ROUNDED_ONCE_MORE = 0.25
_SOMETHING_ELSE = 16.0


def narrow_error(
    candidate: Callable[..., Any],
    original: Callable[..., Any],
    exact: Callable[..., Any],
    batches: Sequence[Sequence[Tensor]],
    dtype: torch.dtype,
) -> ProbeError:
    """0 where the candidate's 16-bit outputs are as close to float32 as the module's; their distance elsewhere.

    Args:
        exact: the module's forward in float32, of the same numbers.
    """
    epsilon = torch.finfo(dtype).eps
    for batch in batches:
        narrow = [x.to(dtype) if x.is_floating_point() else x for x in batch]
        full = [x.float() if x.is_floating_point() else x for x in narrow]
        with torch.no_grad():
            truths, _ = tensors_of(exact(*full))
            own, own_entries = tensors_of(original(*narrow))
            got, entries = tensors_of(candidate(*narrow))
        if entries != own_entries or [x.dtype for x in got] != [x.dtype for x in own]:
            return ProbeError(float("inf"), 0.0)
        for one, other, truth in zip(got, own, truths, strict=True):
            pairs = (one, other), (one, truth), (other, truth)
            apart, error, allowed = (distance(a.float(), b.float()) for a, b in pairs)
            if not (apart <= _SOMETHING_ELSE * epsilon and error <= 1.5 * allowed + _ROUNDED_ONCE_MORE * epsilon):
                return ProbeError(max(apart, error), 0.0)
    return ProbeError(0.0, 0.0)
