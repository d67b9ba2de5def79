"""Tools, tool calls and what a request says about them, in no protocol's form.

A protocol reads its request into ``Tool`` and ``ToolChoice`` and hands messages to ``render`` as transformers and
OpenAI write them: an assistant's message has ``content`` (text, parts or None), ``reasoning_content`` and
``tool_calls`` (a list of ``ToolCall.for_template()``), a tool's result is a message of the role ``tool``
(``tool_message``).
``toolkit.chat.reply`` reads the model's output.
"""

import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

_LETTERS = string.ascii_letters + string.digits
Message = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Args:
        name: of the function.
        description: for the model.
        parameters: JSON schema of the arguments, which are an object.
        strict: whether the arguments must satisfy the schema even where the model chooses to call.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates read it."""
        about = {"description": self.description} if self.description else {}
        return {"type": "function", "function": {"name": self.name, **about, "parameters": dict(self.parameters)}}


@dataclass(frozen=True)
class ToolChoice:
    """Which tools a reply calls.

    Args:
        mode: "none" calls none, "auto" leaves it to the model, "required" calls one at least.
        names: of the tools that may be called; empty for all.
        parallel: whether a reply may have several calls.
    """

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] = ()
    parallel: bool = True

    @classmethod
    def function(cls, name: str) -> "ToolChoice":
        """One call of one function."""
        return cls("required", (name,), parallel=False)

    def allowed(self, tools: Sequence[Tool]) -> list[Tool]:
        """The tools that may be called."""
        if self.mode == "none":
            return []
        return [tool for tool in tools if not self.names or tool.name in self.names]


@dataclass(frozen=True)
class ToolCall:
    """A call of a function.

    Args:
        id: of the call, which a tool's result repeats.
        name: of the function.
        arguments: JSON text of an object, as the model wrote it: clients check it.
    """

    id: str
    name: str
    arguments: str

    def for_template(self) -> dict[str, Any]:
        """The call as an entry of ``tool_calls``; ``render`` parses the arguments for templates that want a mapping."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def new_call_id(length: int | None = None) -> str:
    """An id of a tool call: ``call_`` and 24 letters or digits; with a length as many of them alone."""
    count = 24 if length is None else length
    return ("call_" if length is None else "") + "".join(secrets.choice(_LETTERS) for _ in range(count))


def tool_message(call_id: str, content: Any, name: str = "") -> Message:
    """The result of a tool call as a message.

    Args:
        call_id: of the call.
        content: text or parts.
        name: of the function; ``with_tool_names`` finds it where it is not given.
    """
    return {"role": "tool", "tool_call_id": call_id, "content": content, **({"name": name} if name else {})}


def with_tool_names(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages, where a tool's result has the name of the function that was called: some templates show it."""
    names: dict[str, str] = {}
    named = []
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, (list, tuple)) else ():
            function = call.get("function", call)
            names[str(call.get("id"))] = function.get("name", "")
        known = names.get(str(message.get("tool_call_id")))
        missing = message.get("role") == "tool" and not message.get("name") and known
        named.append({**message, "name": known} if missing else dict(message))
    return named
