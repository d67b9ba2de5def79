"""Collect claims, check them against each other, install them, and take them back."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from toolkit.errors import ToolkitError, nearest
from toolkit.numerics import Numerics
from toolkit.patch.adapters import adopt_adapters, release_adapters
from toolkit.patch.claim import Claim, Undo
from toolkit.patch.probe import device_of
from toolkit.patch.report import PatchReport
from toolkit.patch.sharding import check_whole
from toolkit.patch.weights import count_writes


@dataclass(frozen=True)
class Applied:
    """What lives beside a patched model: its report, the way back, and what was asked for."""

    report: PatchReport
    roles: tuple[str, ...] | None
    undo: tuple[Undo, ...]


_APPLIED: "weakref.WeakKeyDictionary[nn.Module, Applied]" = weakref.WeakKeyDictionary()


def find_claims(
    model: nn.Module, roles: Sequence[str] | None = None, numerics: str | Numerics | None = None
) -> PatchReport:
    """What ``patch`` would do, with every probe run, without doing it.

    Raises ToolkitError for an unknown role, and for a requested role that no module of the model has.
    """
    from toolkit.patch.roles import FINDERS

    tier = Numerics.choose(numerics, device_of(model))
    report = PatchReport(tier)
    for role in roles if roles is not None else FINDERS:
        if role not in FINDERS:
            hint = nearest(role, list(FINDERS))
            raise ToolkitError(f"roles has {role!r}; allowed are {', '.join(FINDERS)}{hint}.")
        found = FINDERS[role](model, tier)
        claims = [item for item in found if isinstance(item, Claim)]
        report.claims.extend(claims)
        report.refusals.extend(item for item in found if not isinstance(item, Claim))
        if roles is not None and not claims:
            reasons = {item.reason for item in found if not isinstance(item, Claim)}
            why = f": {'; '.join(sorted(reasons))}" if reasons else ""
            raise ToolkitError(f"roles has {role!r}, but no module of {type(model).__name__} can take it{why}.")
    _refuse_conflicts(report.claims)
    return report


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
    """
    wanted = tuple(roles) if roles is not None else None
    applied = _APPLIED.get(model)
    if applied is not None:
        same_tier = numerics is None or applied.report.numerics is Numerics.choose(numerics, device_of(model))
        if applied.roles == wanted and same_tier:
            return applied.report
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
    _APPLIED[model] = Applied(report, wanted, tuple(undo))
    adopt_adapters(model)
    return report


def unpatch(model: nn.Module) -> None:
    """Give every replaced module its own forward back. A model that is not patched is left as it is."""
    applied = _APPLIED.pop(model, None)
    if applied is not None:
        release_adapters(model)
        for step in reversed(applied.undo):
            step()


def report_of(model: nn.Module) -> PatchReport | None:
    """The report of a patched model, None for another."""
    applied = _APPLIED.get(model)
    return applied.report if applied is not None else None
