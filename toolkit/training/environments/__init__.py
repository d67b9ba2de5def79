"""Environments, one file each, by the name that a recipe gives; ``package.module:Class`` names one elsewhere."""

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.training.environments.base import ENVIRONMENTS, Environment, Messages, Rubric, State
from toolkit.training.environments.tools import ToolEnvironment
from toolkit.training.tasks.base import imported

__all__ = ["ENVIRONMENTS", "Environment", "Messages", "Rubric", "State", "ToolEnvironment", "make_environment"]


def make_environment(
    environment: str | Mapping[str, Any] | None, environment_factory: str | None, tools: Sequence[str]
) -> Environment | None:
    """The environment that a recipe's fields describe; None where they are not given.

    Raises:
        ToolkitError: something that they name cannot be imported, or does not fit its field.
    """
    if environment is not None:
        options = {"name": environment} if isinstance(environment, str) else dict(environment)
        return _made(options)
    if environment_factory is None and not tools:
        return None
    functions = [imported(name, f"objective.tools[{at}]", "a function") for at, name in enumerate(tools)]
    factory = None
    if environment_factory is not None:
        factory = imported(environment_factory, "objective.environment_factory", "a class or function")
    return ToolEnvironment(functions, factory)


def _made(options: dict[str, Any]) -> Environment:
    name = options.pop("name", None)
    if isinstance(name, str) and ":" in name:
        kind = imported(name, "objective.environment", "a class")
        if not (isinstance(kind, type) and issubclass(kind, Environment)):
            raise ToolkitError(f"objective.environment must be a class derived from Environment, got '{name}'.")
    else:
        kind = ENVIRONMENTS.find("objective.environment", name, ["package.module:Class"])
    try:
        made: Environment = kind(**options)
    except TypeError as error:
        raise ToolkitError(
            f"objective.environment must have the fields of '{name}', got {options!r} ({error})."
        ) from None
    return made
