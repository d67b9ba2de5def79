"""Where a run starts: in a clean folder, or from one of its checkpoints."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from toolkit.config import Recipe, validate
from toolkit.errors import ToolkitError
from toolkit.loading.run import latest, name_of, steps_in
from toolkit.training import checkpoint
from toolkit.training.details import FILE as DETAILS
from toolkit.training.final_exports import remove_exports
from toolkit.training.metrics import FILE as METRICS
from toolkit.training.metrics import PLOTS

if TYPE_CHECKING:
    from toolkit.training.objectives.base import Objective

RESULT = "result.json"
AVERAGED = "ema"

# What may differ between the recipe that wrote a checkpoint and the one that resumes from it.
_FREE = {
    "run_name", "output_dir", "resume_from_checkpoint", "overwrite", "checkpoint", "log", "evaluate", "export",
    "train.max_steps", "train.num_train_epochs",
    "train.distributed.strategy", "train.distributed.cpu_offload", "train.distributed.deepspeed",
    "objective.on_bad_lines", "objective.max_check_samples", "objective.dataset_prepared_path",
}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """A verified checkpoint to resume from, and the state saved with it."""

    checkpoint: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def run_folder(recipe: Recipe) -> Path:
    """``output_dir/run_name``."""
    return Path(recipe.output_dir) / recipe.run_name


def find_start(recipe: Recipe) -> Start | None:
    """The checkpoint that ``resume_from_checkpoint`` asks for, verified; None for a new start. Changes nothing.

    Raises ToolkitError for a run that has checkpoints and is to be neither resumed nor overwritten, for a
    checkpoint that is not there or corrupt, and for a recipe that would not have given that checkpoint.
    """
    folder = run_folder(recipe) / "checkpoints"
    steps = steps_in(folder)
    wanted = recipe.resume_from_checkpoint
    if wanted is False:
        if steps and not recipe.overwrite:
            raise ToolkitError(
                f"{run_folder(recipe)} already holds checkpoints up to step {steps[-1]}; resume with "
                "--resume, start again with overwrite=true, or choose another run_name=."
            )
        return None
    if wanted is True:
        path = latest(folder)
        if path is None:
            return None
    else:
        step = int(str(wanted).removeprefix("step-"))
        if step not in steps:
            known = ", ".join(name_of(other) for other in steps) or "none"
            raise ToolkitError(
                f"resume_from_checkpoint must be a checkpoint of {folder}, got '{wanted}'; there are {known}."
            )
        path = folder / name_of(step)
    checkpoint.verify(path)
    start = Start(path, json.loads((path / "training" / "state.json").read_text(encoding="utf-8")))
    _check_recipe(recipe, path, start.state["world_size"])
    if recipe.train.num_train_epochs is None and start.step > recipe.train.max_steps:
        raise ToolkitError(
            f"train.max_steps must be >= {start.step}, the step of {path}, got {recipe.train.max_steps}."
        )
    return start


def _check_recipe(recipe: Recipe, path: Path, processes: int) -> None:
    saved = validate(yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8")))
    old, new = _flat(saved.model_dump()), _flat(recipe.model_dump())
    if old["data.streams"] is None and new["data.streams"] == processes:
        old["data.streams"] = processes  # which null is
    for field in [*new, *(field for field in old if field not in new)]:
        if old.get(field) != new.get(field) and not ({field, field.partition(".")[0]} & _FREE):
            raise ToolkitError(
                f"{field} must be {old.get(field)!r} to resume from {path}, got {new.get(field)!r}; or start a new run "
                "with another run_name=."
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def prepare_folder(recipe: Recipe, start: Start | None) -> list[str]:
    """Make the run's folder fit the start: remove leftovers and what is later than it.

    Returns the names of the checkpoints removed.
    """
    folder = run_folder(recipe)
    checkpoints = folder / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolkitError(
            f"output_dir must be a folder to write to, got '{recipe.output_dir}' ({folder}: {error.strerror})."
        ) from None
    for leftover in folder.glob(".*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    checkpoint.clean(checkpoints)
    (folder / RESULT).unlink(missing_ok=True)
    for name in (PLOTS, AVERAGED):
        shutil.rmtree(folder / name, ignore_errors=True)
    remove_exports(folder)
    if start is not None:
        return checkpoint.drop_after(checkpoints, start.step)
    dropped = [name_of(step) for step in steps_in(checkpoints)]
    # Renamed first: after a crash while deleting, no part of the old run can be resumed.
    staging = folder / ".checkpoints.old"
    checkpoints.rename(staging)
    checkpoints.mkdir()
    shutil.rmtree(staging)
    for name in (METRICS, DETAILS, "wandb_id"):
        (folder / name).unlink(missing_ok=True)
    for of_logger in ("tensorboard", "wandb"):
        shutil.rmtree(folder / of_logger, ignore_errors=True)
    return dropped


def check_start(start: Start, objective: "Objective[Any]") -> None:
    """Raise ToolkitError for a checkpoint of other data."""
    if start.state["data_fingerprint"] != objective.fingerprint:
        raise ToolkitError(
            f"{objective.data_changed()} than when {start.checkpoint} was written; resuming needs the same."
        )
