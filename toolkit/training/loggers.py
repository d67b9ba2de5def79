"""Loggers of other projects beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio; offline."""

import importlib.util
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.config import Recipe
from toolkit.errors import ToolkitError


class Logger(ABC):
    """Takes the numbers of every step.

    Args:
        recipe: of the run.
        folder: of the run.
        step: that the run continues from; 0 for a new start.
    """

    @abstractmethod
    def __init__(self, recipe: Recipe, folder: Path, step: int) -> None: ...

    @abstractmethod
    def write(self, values: Mapping[str, float], step: int) -> None:
        """Record the numbers of a step."""

    @abstractmethod
    def flush(self) -> None:
        """Write what is held in memory, as far as the logger can."""

    @abstractmethod
    def close(self) -> None:
        """The run has ended."""


class TensorBoard(Logger):
    """Event files in ``tensorboard``; steps later than ``step`` are hidden."""

    def __init__(self, recipe: Recipe, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _RunLogger(Logger):
    """A run of a client that writes as it is given."""

    _run: Any

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        return

    def close(self) -> None:
        self._run.finish()


class Wandb(_RunLogger):
    """A run in ``wandb``, offline unless the environment says otherwise. A run that resumes writes another file of the
    same run, which ``wandb sync`` joins."""

    def __init__(self, recipe: Recipe, folder: Path, step: int) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=recipe.log.project,
            name=recipe.run_name,
            id=_identity(folder, "wandb_id"),
            resume="allow",
            dir=str(folder),
            mode=mode,
            config=recipe.model_dump(),
        )


class Trackio(_RunLogger):
    """A run in Trackio's local database."""

    def __init__(self, recipe: Recipe, folder: Path, step: int) -> None:
        import trackio

        resume = "allow" if step else "never"
        config = json.loads(json.dumps(recipe.model_dump()))
        self._run = trackio.init(
            project=recipe.log.project, name=recipe.run_name, resume=resume, config=config, embed=False
        )


_LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def check_loggers(recipe: Recipe) -> None:
    """Raise ToolkitError, before anything is trained, for loggers that are not installed."""
    for name in recipe.log.report_to:
        if importlib.util.find_spec(name) is None:
            raise ToolkitError(f"log.report_to '{name}' needs the package '{name}': pip install {name}.")


def make_loggers(recipe: Recipe, folder: Path, step: int) -> list[Logger]:
    """The loggers of a recipe's run that continues from ``step``."""
    return [_LOGGERS[name](recipe, folder, step) for name in recipe.log.report_to]


def _identity(folder: Path, name: str) -> str:
    """What a logger knows the run by when it resumes, kept in the run's folder."""
    file = folder / name
    if not file.is_file():
        file.write_text(os.urandom(4).hex(), encoding="utf-8")
    return file.read_text(encoding="utf-8")
