"""The search that the per-module roles share; modules that compute the same function are proven once."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from toolkit.errors import first_line
from toolkit.patching.claim import Claim, ProbeError, Skipped, replace_forward
from toolkit.patching.probe import signature_key
from toolkit.patching.settings import guarded, settings_of

T = TypeVar("T")

# One op that a module might compute: its name in the report, the new forward, and its probe.
Candidate = tuple[str, Callable[..., Any], Callable[[], ProbeError]]


def search(
    model: nn.Module, role: str, candidates: Callable[[nn.Module], list[Candidate] | None], guard: bool = False
) -> list[Claim | Skipped]:
    """Claims and skipped modules of ``role``.

    Args:
        candidates: of a module; None where it does not look like the role. The first whose probe passes is claimed. An
            exception in a probe means that the module is something else.
        guard: whether the forwards go by settings that they do not read again.
    """
    found: list[Claim | Skipped] = []
    proven: dict[Any, tuple[str, Callable[..., Any], ProbeError] | str] = {}
    for path, module in model.named_modules():
        options = candidates(module)
        if options is None:
            continue
        key = signature_key(module)
        if key not in proven:
            first = prove(options)
            if guard and not isinstance(first, str):
                first = first[0], guarded(first[1], settings_of(module)), first[2]
            proven[key] = first
        verdict = proven[key]
        if isinstance(verdict, str):
            found.append(Skipped(role, path, verdict))
        else:
            op, forward, error = verdict
            found.append(Claim(role, path, module, op, error, replace_forward(module, forward)))
    return found


def prove(options: Sequence[tuple[str, T, Callable[[], ProbeError]]]) -> tuple[str, T, ProbeError] | str:
    """The first candidate that the probe confirms, or the reason why none is."""
    closest: tuple[ProbeError, str] | None = None
    failure = "no candidate has its structure"
    for op, forward, probe in options:
        try:
            error = probe()
        except Exception as problem:
            failure = f"its probe as {op} failed: {first_line(problem, with_class=True)}"
            continue
        if error.passes():
            return op, forward, error
        # What fails under a later condition has passed those before.
        if closest is None or (not error.where, error.worst()) < (not closest[0].where, closest[0].worst()):
            closest = error, op
    if closest is not None:
        error, op = closest
        return f"it is not {op}: probe error {error.worst():.1e}{error.where}"
    return failure
