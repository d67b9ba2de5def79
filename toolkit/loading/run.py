"""The folder of a training run: its checkpoints by name, and the latest of them."""

import re
from pathlib import Path

from toolkit.errors import ToolkitError

LATEST = "latest"
BEST = "best"
_NAME = re.compile(r"^step-(\d{6,})$")


def name_of(step: int) -> str:
    """``step-000100`` for 100."""
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """100 for ``step-000100``, None for a name that is no checkpoint's."""
    match = _NAME.match(name)
    return int(match[1]) if match else None


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in ``folder``, ascending."""
    if not folder.is_dir():
        return []
    steps = (step_of(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(step for step in steps if step is not None)


def latest(folder: Path) -> Path | None:
    """The checkpoint that ``folder``/latest names; without that file, the one of the highest step; else None."""
    if not (folder / LATEST).is_file():
        steps = steps_in(folder)
        return folder / name_of(steps[-1]) if steps else None
    return _named(folder, LATEST)


def served(folder: Path) -> Path | None:
    """The checkpoint that a run is opened by: the one that ``folder``/best names, where there is such a file, else the
    latest."""
    return _named(folder, BEST) if (folder / BEST).is_file() else latest(folder)


def _named(folder: Path, name: str) -> Path:
    pointer = folder / name
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if step_of(name) is None or not (folder / name).is_dir():
        known = ", ".join(name_of(step) for step in steps_in(folder)) or "none"
        raise ToolkitError(f"{pointer} names '{name}', which is no checkpoint there; there are {known}.")
    return folder / name
