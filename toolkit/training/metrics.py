"""Metrics of a run: metrics.jsonl (one line per step), details.jsonl, loggers, and plots."""

import json
import os
from pathlib import Path
from typing import IO, Any

from toolkit.config import Recipe
from toolkit.files import write_atomic
from toolkit.strict_json import strict_json
from toolkit.training.details import FILE as DETAILS
from toolkit.training.details import StepDetails
from toolkit.training.loggers import make_loggers

FILE = "metrics.jsonl"
PLOTS = "plots"
"""Folder of the run's plots; a run that starts or resumes removes it."""


class Metrics:
    """Appends to ``metrics.jsonl``, ``details.jsonl`` and the recipe's loggers; lines later than ``step`` are dropped.

    Args:
        details: of the steps, which are written with their metrics.
    """

    def __init__(self, recipe: Recipe, folder: Path, step: int, details: StepDetails) -> None:
        self._file, self._details_file = _opened(folder / FILE, step), _opened(folder / DETAILS, step)
        self._details = details
        details.begin(step + 1)
        self._loggers = make_loggers(recipe, folder, step)

    def write(self, values: dict[str, float | int]) -> None:
        """Record one step; ``values`` has "step" and numbers, NaN and infinities written as null."""
        found = self._details.take()
        if found:
            self._details_file.write(strict_json({"step": values["step"], **found}) + "\n")
            self._details_file.flush()
        self._file.write(strict_json(values) + "\n")
        self._file.flush()
        self._details.begin(int(values["step"]) + 1)
        scalars = {name: value for name, value in values.items() if name != "step"}
        for logger in self._loggers:
            logger.write(scalars, int(values["step"]))

    def sync(self) -> None:
        """Flush to disk, so that a checkpoint never knows more steps than the metrics."""
        for file in (self._file, self._details_file):
            os.fsync(file.fileno())
        for logger in self._loggers:
            logger.flush()

    def close(self) -> None:
        self._file.close()
        self._details_file.close()
        for logger in self._loggers:
            logger.close()


def _opened(path: Path, step: int) -> IO[str]:
    """A file of steps, to append to, without the lines that are later than ``step``."""
    kept = [strict_json(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
    write_atomic(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, one per step, without a last line that a crash left incomplete."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def plot_curve(lines: list[dict[str, Any]], name: str, folder: Path, title: str) -> None:
    """Write the curve of one metric to ``folder``/plots: every step, and a running mean over a fiftieth of the run."""
    import io

    from matplotlib.figure import Figure

    lines = [line for line in lines if line[name] is not None]
    steps, values = [line["step"] for line in lines], [line[name] for line in lines]
    width = max(len(lines) // 50, 1)
    smooth = [sum(values[max(i - width + 1, 0) : i + 1]) / min(i + 1, width) for i in range(len(values))]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(steps, smooth, color="tab:blue", label=f"mean of {width} steps")
    unit = "loss (nats per token)" if name == "loss" else name
    axes.set(xlabel="step", ylabel=unit, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    path = folder / PLOTS / f"{name.replace('/', '_')}.png"
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, image.getvalue())
