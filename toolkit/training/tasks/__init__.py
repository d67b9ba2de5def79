"""Verifiable tasks, a file each, by the name that a recipe gives; ``package.module:Class`` names one elsewhere."""

import importlib
from collections.abc import Mapping
from typing import Any

from toolkit.errors import ToolkitError, nearest
from toolkit.training.tasks.base import Problem, ProblemStream, Task
from toolkit.training.tasks.countdown import Countdown

__all__ = ["TASKS", "Problem", "ProblemStream", "Task", "make_task"]

TASKS: dict[str, type[Task]] = {"countdown": Countdown}


def make_task(fields: Mapping[str, Any]) -> Task:
    """The task that ``fields["name"]`` names, made with the other fields. ToolkitError where that cannot be."""
    options = dict(fields)
    name = options.pop("name", None)
    kind: Any = TASKS.get(name) if isinstance(name, str) else None
    if kind is None:
        if not isinstance(name, str) or ":" not in name:
            hint = nearest(str(name), list(TASKS)) or "."
            listed = ", ".join(f"'{one}'" for one in TASKS)
            raise ToolkitError(
                f"objective.task.name is {name!r}; it must be one of {listed}, or 'package.module:Class'{hint}"
            )
        module, _, attribute = name.partition(":")
        try:
            kind = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ToolkitError(f"objective.task.name is '{name}', which cannot be imported: {error}.") from None
        if not (isinstance(kind, type) and issubclass(kind, Task)):
            raise ToolkitError(f"objective.task.name is '{name}'; it must be a class derived from Task.")
    try:
        return kind(**options)
    except TypeError as error:
        raise ToolkitError(f"objective.task is {dict(fields)!r}, which task '{name}' does not take: {error}.") from None
