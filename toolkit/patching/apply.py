"""Collect claims, check them against each other, install them, and take them back."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from toolkit.errors import ToolkitError, nearest
from toolkit.numerics import Numerics
from toolkit.patching.adapters import adopt_adapters, release_adapters
from toolkit.patching.claim import Claim, Refusal, Undo
from toolkit.patching.linear_adapters import FUSED, adapter_report, adapters_aside, inner_model
from toolkit.patching.probe import device_of
from toolkit.patching.report import PatchReport
from toolkit.patching.sharding import check_whole
from toolkit.patching.weights import count_writes


@dataclass(frozen=True)
class Applied:
    """What a patched model carries: its report, the way back, and what was asked for.

    A deep copy of the model is patched too, with a record of its own. A pickled model comes back with its classes' own
    forwards, which pickle finds, and with the way back for the settings that it keeps.
    """

    report: PatchReport | None
    roles: tuple[str, ...] | None
    undo: tuple[Undo, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Applied":
        return Applied(copy.deepcopy(self.report, memo), self.roles, copy.deepcopy(self.undo, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.undo,)


def _unpickled(undo: tuple[Undo, ...]) -> Applied:

    from toolkit.patching import attention_interface, experts_interface

    attention_interface.register()
    experts_interface.register()
    return Applied(None, None, undo)


_RECORD = "_toolkit_patch"
"""The attribute of a patched model that holds its ``Applied``: it goes wherever the model goes, and away with it."""


def find_claims(
    model: nn.Module, roles: Sequence[str] | None = None, numerics: str | Numerics | None = None
) -> PatchReport:
    """What ``patch`` would do, with every probe run, without doing it.

    Raises ToolkitError for an unknown role, for a requested role that no module of the model has, and for parameters
    that are on the meta device.
    """
    model = inner_model(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ToolkitError(
                f"parameter {name} is on the meta device (not loaded yet, or offloaded); allowed is patching a model "
                "whose weights are all there."
            )
    tier = Numerics.choose(numerics, device_of(model))
    report = PatchReport(tier)
    with adapters_aside(model):
        _collect(model, roles, report)
    _refuse_conflicts(report.claims)
    return report


def _collect(model: nn.Module, roles: Sequence[str] | None, report: PatchReport) -> None:
    from toolkit.patching.roles import FINDERS

    for role in roles if roles is not None else FINDERS:
        if role not in FINDERS:
            hint = nearest(role, list(FINDERS))
            raise ToolkitError(f"roles has {role!r}; allowed are {', '.join(FINDERS)}{hint}.")
        found = FINDERS[role](model, report.numerics)
        claims = [item for item in found if isinstance(item, Claim)]
        report.claims.extend(claims)
        report.refusals.extend(item for item in found if not isinstance(item, Claim))
        if roles is not None and not claims:
            reasons = {item.reason for item in found if not isinstance(item, Claim)}
            why = f": {'; '.join(sorted(reasons))}" if reasons else ""
            raise ToolkitError(f"roles has {role!r}, but no module of {type(model).__name__} can take it{why}.")


def _refuse_conflicts(claims: list[Claim]) -> None:
    taken: dict[int, Claim] = {}
    for claim in claims:
        if claim.path == "":  # settings of the model as a whole, not a module's forward
            continue
        other = taken.setdefault(id(claim.module), claim)
        if other is not claim:
            raise ToolkitError(
                f"roles {other.role!r} and {claim.role!r} both claim {claim.path}; ask for one of them with roles=."
            )


def patch(model: nn.Module, roles: Sequence[str] | None = None, numerics: str | Numerics | None = None) -> PatchReport:
    """Replace the forwards of ``model`` by shared ops, in place, each one proven by a probe first.

    roles: any of norm, rotary, mlp, activation, router, experts, attention, mixer, layer, linear, head; None takes
    all there are.
    numerics: "bitwise" or "fast" (toolkit.numerics); None is bitwise on CPU and fast elsewhere.
    Returns the report: what was replaced with which probe errors, and what was left alone and why.
    Parameters keep their names, storage and layout. Patching twice is patching once; other roles or another tier
    replace the earlier patch. ``unpatch`` restores the model.
    A ``PeftModel`` is patched like the model inside of it, before or after its adapters came in.
    """
    model = inner_model(model)
    wanted = tuple(roles) if roles is not None else None
    report = report_of(model)
    if report is not None:
        same_tier = numerics is None or report.numerics is Numerics.choose(numerics, device_of(model))
        if model.__dict__[_RECORD].roles == wanted and same_tier:
            return report
    unpatch(model)
    check_whole(model, "patching")
    count_writes(model)  # deferred logits and the weight version tell changes by torch's counters
    report = find_claims(model, roles, numerics)
    undo: list[Undo] = []
    try:
        for claim in report.claims:
            undo.append(claim.install())
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    model.__dict__[_RECORD] = Applied(report, wanted, tuple(undo))
    adopt_adapters(model, report.numerics)
    left = [(path, verdict) for path, verdict in adapter_report(model) if verdict != FUSED]
    report.refusals.extend(Refusal("adapter", path, reason) for path, reason in left)
    return report


def unpatch(model: nn.Module) -> None:
    """Give every replaced module its own forward back. A model that is not patched is left as it is."""
    model = inner_model(model)
    applied = model.__dict__.pop(_RECORD, None)
    if applied is not None:
        release_adapters(model)
        for step in reversed(applied.undo):
            step()


def report_of(model: nn.Module) -> PatchReport | None:
    """The report of a patched model, None for another."""
    applied = inner_model(model).__dict__.get(_RECORD)
    return applied.report if applied is not None else None
