"""Verifiable tasks, one file each, by the name that a recipe gives; ``package.module:Class`` names one elsewhere."""

from collections.abc import Mapping
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.training.tasks.base import TASKS, Problem, ProblemStream, Task, checked_reward, imported

__all__ = ["TASKS", "Problem", "ProblemStream", "Task", "checked_reward", "make_task"]


def make_task(fields: Mapping[str, Any]) -> Task:
    """The task that ``fields["name"]`` names, made with the other fields.

    Raises:
        ToolkitError: there is no such task, or it does not take the fields.
    """
    options = dict(fields)
    name = options.pop("name", None)
    kind = None
    if isinstance(name, str) and ":" in name:
        before, _, variant = name.partition(":")
        kind = TASKS.get(before)
        if kind is not None and kind.takes_variant is not None:
            options[kind.takes_variant] = variant
        else:
            kind = _imported(name)
    if kind is None:
        kind = TASKS.find("objective.task.name", name, ["package.module:Class"])
    try:
        return kind(**options)
    except TypeError as error:
        raise ToolkitError(
            f"objective.task must have the fields of '{name}', got {dict(fields)!r} ({error})."
        ) from None


def _imported(name: str) -> type[Task]:
    kind = imported(name, "objective.task.name", "a class")
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise ToolkitError(f"objective.task.name must be a class derived from Task, got '{name}'.")
    return kind
