"""Which parameters a run trains, by their names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from toolkit.config.schema import ModelSection
from toolkit.errors import ToolkitError, nearest

if TYPE_CHECKING:
    from torch import nn


def freeze_parameters(model: "nn.Module", section: ModelSection) -> str | None:
    """Freeze what the section names; a sentence of what is frozen, None where nothing is.

    Raises ToolkitError for a pattern that no parameter's name matches, and where nothing is left to train.
    """
    if section.freeze_parameters is None:
        return None
    named = dict(model.named_parameters())
    frozen = _matched(section.freeze_parameters, named, "model.freeze_parameters")
    kept = _matched(section.trainable_parameters or (), named, "model.trainable_parameters")
    for name, parameter in named.items():
        parameter.requires_grad_(parameter.requires_grad and (name in kept or name not in frozen))
    still = [parameter for parameter in named.values() if not parameter.requires_grad]
    if len(still) == len(named):
        raise ToolkitError(
            f"model.freeze_parameters must leave a parameter to train, got {section.freeze_parameters!r}; name some in "
            "model.trainable_parameters."
        )
    return f"{len(still)} of {len(named)} tensors, {sum(one.numel() for one in still) / 1e6:.3f} M parameters"


def _matched(patterns: Sequence[str], names: Sequence[str] | dict[str, "nn.Parameter"], field: str) -> set[str]:
    """The names that a pattern matches, as a whole or in front of a dot: ``model.visual`` is all of it."""
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not matched:
            hint = nearest(pattern, sorted({name.rpartition(".")[0] for name in names})) or "."
            raise ToolkitError(f"{field} must match names of the model's parameters, got {pattern!r}{hint}")
        found |= matched
    return found
