"""What the page of a run asks for, as JSON."""

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from toolkit.errors import ToolkitError
from toolkit.sentences import shown
from toolkit.serving.watch.lines import Step, StepFile
from toolkit.strict_json import strict_json

MOST_POINTS = 2000
"""Most lines of one response; of more, evenly spaced ones are sent, the newest among them."""


class WatchedRun:
    """The folder of a run, read again at every question, from any thread. It may be written later than this is made.

    Raises:
        ToolkitError: where ``folder`` is something else than a folder, or holds what no run has written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir() or (any(folder.iterdir()) and not self._is_run()):
            what = "a folder without metrics.jsonl and recipe.yaml" if folder.is_dir() else "no folder"
            raise ToolkitError(f"RUN must be the folder of a training run, got {shown(str(folder))}, {what}.")
        self._lock = threading.Lock()
        self._metrics, self._details = StepFile(folder / "metrics.jsonl"), StepFile(folder / "details.jsonl")

    def _is_run(self) -> bool:
        known = ("metrics.jsonl", "recipe.yaml", "checkpoints", "warmup", "teacher")
        return any((self.folder / name).exists() for name in known)

    def respond(self, name: str, query: Mapping[str, str]) -> str | None:
        """The JSON text of ``steps`` or ``details``; None for another name, or a step that has no details.

        Args:
            query: of steps ``generation`` and ``after``: what the page has already, a number of lines of a generation
                of the file. Of details ``step``.
        """
        with self._lock:
            if name == "steps":
                return self._steps(_number(query, "generation"), _number(query, "after"))
            if name == "details":
                return self._of_step(_number(query, "step"))
        return None

    def _steps(self, generation: int, after: int) -> str:
        for file in (self._metrics, self._details):
            file.update()
        found, fresh = self._metrics.steps, generation != self._metrics.generation
        wanted = found if fresh else found[after:]
        stride = -(-len(wanted) // MOST_POINTS) or 1
        sent = wanted[::-1][::stride][::-1]
        lines = self._metrics.read(sent)
        about = {
            "run": self._about(),
            "generation": self._metrics.generation,
            "count": len(found) if lines else after,
            "fresh": fresh,
            "stride": stride,
            "detailed_steps": [one.step for one in self._details.steps],
        }
        return f'{strict_json(about)[:-1]}, "lines": [{b",".join(lines).decode()}]}}'

    def _of_step(self, step: int) -> str | None:
        self._details.update()
        found: list[Step] = [one for one in self._details.steps if one.step == step]
        lines = self._details.read(found[-1:])
        return lines[0].decode() if lines else None

    def _about(self) -> dict[str, Any]:
        """Of the recipe, where it has been written, and whether the run has ended."""
        recipe: Any = None
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # it may not be there yet
            recipe = yaml.safe_load((self.folder / "recipe.yaml").read_text(encoding="utf-8"))
        recipe = recipe if isinstance(recipe, dict) else {}
        return {
            "name": recipe.get("run_name") or self.folder.resolve().name,
            "objective": (recipe.get("objective") or {}).get("kind"),
            "max_steps": (recipe.get("train") or {}).get("max_steps"),
            "finished": (self.folder / "result.json").is_file(),
            "nested": [name for name in ("warmup", "teacher") if (self.folder / name).is_dir()],
        }


def _number(query: Mapping[str, str], name: str) -> int:
    text = query.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 19 else -1
