"""What a chat request says about tools, read into ``chat.tools``."""

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from toolkit.chat.tools import Tool, ToolChoice
from toolkit.sentences import shown
from toolkit.serving.body import Body

MAX_TOOLS = 512
_NAME = re.compile(r"[^\s\"'<>{}()\[\]|,;=\\]{1,128}")


class FunctionSpec(Body):
    """A function that the model may call.

    Args:
        name: of the function.
        description: for the model.
        parameters: JSON schema of its arguments; without one it takes none.
        strict: whether arguments must satisfy the schema even where the model chooses to call.
        return: accepted and unused: what transformers' ``get_json_schema`` writes of a docstring's ``Returns:``.
    """

    ignored = ("return",)
    name: str
    description: str = ""
    parameters: dict[str, Any] = Field({})
    strict: bool = False

    @field_validator("name")
    @classmethod
    def _a_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            allowed = "1 to 128 letters, digits, '_', '-' or '.'"
            raise ValueError(f"'name' of a function must be {allowed}, got {shown(name)}.")
        return name

    @field_validator("parameters")
    @classmethod
    def _an_object(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        kind = parameters.get("type", "object")
        if kind != "object":
            raise ValueError(f"'parameters' of a function must have the type 'object', got {shown(kind)}.")
        return parameters


class ToolSpec(Body):
    """A tool: a function."""

    type: Literal["function"] = "function"
    function: FunctionSpec

    def tool(self) -> Tool:
        """In no protocol's form."""
        schema = {"type": "object", "properties": {}, **self.function.parameters}
        return Tool(self.function.name, self.function.description, schema, self.function.strict)


class NamedFunction(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """A tool by its name."""

    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedTools(Body):
    """Some of the tools.

    Args:
        mode: "auto" or "required".
        tools: those that may be called.
    """

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class ToolChoiceObject(Body):
    """A choice that names tools: one function, or those that are allowed."""

    type: Literal["function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


ToolChoiceField = Literal["none", "auto", "required"] | ToolChoiceObject


def checked_choice(tools: Sequence[ToolSpec], given: ToolChoiceField | None, parallel: bool) -> ToolChoice:
    """The choice of a request. Raises ValueError for one that does not fit its tools."""
    names = [one.function.name for one in tools]
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise ValueError(f"'tools' must have a function once, got {shown(twice)} twice.")
    if given is None or isinstance(given, str):
        if given == "required" and not tools:
            raise ValueError("'tool_choice' is 'required', but 'tools' has none.")
        return ToolChoice(given or "auto", parallel=parallel)
    chosen = given.allowed_tools if given.type == "allowed_tools" else given.function
    if chosen is None:
        raise ValueError(f"'tool_choice.{given.type}' is required with the type '{given.type}'.")
    wanted = [one.function.name for one in chosen.tools] if isinstance(chosen, AllowedTools) else [chosen.name]
    unknown = next((name for name in wanted if name not in names), None)
    if unknown is not None:
        known = f"one of {', '.join(map(shown, names))}" if names else "left out, for 'tools' has none"
        raise ValueError(f"'tool_choice' must be {known}, got {shown(unknown)}.")
    if isinstance(chosen, AllowedTools):
        return ToolChoice(chosen.mode, tuple(wanted), parallel)
    return ToolChoice.function(wanted[0])
