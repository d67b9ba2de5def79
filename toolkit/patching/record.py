"""What a patched model carries: an attribute that goes wherever the model goes."""

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from toolkit.errors import ToolkitError
from toolkit.patching import attention_interface, experts_interface
from toolkit.patching.adapters import inner_model
from toolkit.patching.claim import Undo
from toolkit.patching.instance_forward import InstalledForwards
from toolkit.patching.report import PatchReport

_ATTRIBUTE = "_toolkit_patch"


@dataclass(frozen=True)
class PatchRecord:
    """The report of a patch, its undo steps, and the roles that were asked for.

    A deep copy of the model is patched too and has a copy of the record. A pickled model is loaded with its classes'
    own forwards, which pickle finds by name, and with the undo steps of its changed settings.

    Args:
        report: None after unpickling.
        roles: as given to ``patch``; None for all.
        undo: steps of what was installed, in order.
        forwards: that were installed; None after unpickling.
    """

    report: PatchReport | None
    roles: tuple[str, ...] | None
    undo: tuple[Undo, ...]
    forwards: InstalledForwards | None

    def __deepcopy__(self, memo: dict[int, Any]) -> "PatchRecord":
        undo, forwards = copy.deepcopy(self.undo, memo), copy.deepcopy(self.forwards, memo)
        return PatchRecord(copy.deepcopy(self.report, memo), self.roles, undo, forwards)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.undo,)


def _unpickled(undo: tuple[Undo, ...]) -> PatchRecord:
    attention_interface.register()
    experts_interface.register()
    return PatchRecord(None, None, undo, None)


def put_record(model: nn.Module, record: PatchRecord) -> None:
    """Mark ``model`` as patched."""
    model.__dict__[_ATTRIBUTE] = record


def pop_record(model: nn.Module) -> PatchRecord | None:
    """The record of ``model``, which has none afterwards."""
    record: PatchRecord | None = model.__dict__.pop(_ATTRIBUTE, None)
    return record


def record_of(model: nn.Module) -> PatchRecord | None:
    """The record of a patched model (or of the one in a ``PeftModel``); None for another model."""
    record: PatchRecord | None = inner_model(model).__dict__.get(_ATTRIBUTE)
    return record


def check_forwards(model: nn.Module) -> None:
    """Raise ToolkitError where a module of a patched model runs another forward than the patch's."""
    record = record_of(model)
    replaced = record.forwards.replaced() if record is not None and record.forwards is not None else []
    if replaced:
        raise ToolkitError(f"{replaced[0]}.")


def report_of(model: nn.Module) -> PatchReport | None:
    """The report of a patched model; None for another model."""
    record = record_of(model)
    return record.report if record is not None else None
