"""Exports at a run's end: ``export`` of a recipe."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.config import ExportSection, Recipe
from toolkit.errors import ToolkitError
from toolkit.exporting import TARGETS
from toolkit.exporting.base import chosen_format, require_packages

if TYPE_CHECKING:
    from toolkit.training.loop import Trainer

FOLDER = "export"
"""In the run's folder; an export is in ``TO`` or ``TO-QUANTISE`` below it."""


def check_exports(recipe: Recipe) -> None:
    """Raise ToolkitError, before anything is trained, for exports that cannot be written."""
    names = [_name(section) for section in recipe.export]
    for at, section in enumerate(recipe.export):
        target = TARGETS.find(f"export[{at}].to", section.to)()
        try:
            quantise = chosen_format(target, section.quantise)
        except ToolkitError as error:
            raise ToolkitError(f"export[{at}].{error}") from None
        require_packages(target, quantise)
        if section.imatrix is not None:
            try:
                target.check_imatrix(Path(section.imatrix), quantise)
            except ToolkitError as error:
                raise ToolkitError(f"export[{at}].{error}") from None
        if target.holds_adapters and recipe.model.lora is None:
            raise ToolkitError(
                f"export[{at}].to must be a target of whole models without model.lora, got {section.to!r}."
            )
        if names.index(names[at]) != at:
            raise ToolkitError(f"export[{at}] must differ from the others, got {names[at]!r} again.")


def remove_exports(folder: Path) -> None:
    """Remove what an earlier end of the run in ``folder`` exported."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def write_exports(trainer: "Trainer") -> list[dict[str, Any]]:
    """Export the run's last checkpoint as its recipe says, and compare; what ``result.json`` says of it.

    Raises:
        ToolkitError: a target that cannot hold the model. The run and the exports before it stay.
    """
    from toolkit.exporting.compared import export_and_compare

    recipe, written = trainer.recipe, []
    for at, section in enumerate(recipe.export):
        path = trainer.folder / FOLDER / _name(section)
        trainer.log(f"exporting {section.to}")
        try:
            compared = export_and_compare(
                str(trainer.folder), path, section.to, section.quantise, recipe.forward_dtype, section.check,
                section.imatrix,
            )  # fmt: skip
        except ToolkitError as error:
            raise ToolkitError(f"The run is complete, but export[{at}] failed: {error}") from None
        trainer.log(f"exported to {path}" + ("" if compared.consumer is None else f"; {compared}"))
        if not compared.ok:
            raise ToolkitError(f"The run is complete, but export[{at}] generates other tokens: {compared}.")
        written.append(
            {
                "path": str(path.relative_to(trainer.folder)),
                "consumer": compared.consumer,
                "equal_prompts": compared.equal,
            }
        )
    return written


def _name(section: ExportSection) -> str:
    return section.to if section.quantise is None else f"{section.to}-{section.quantise}"
