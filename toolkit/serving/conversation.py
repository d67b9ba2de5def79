"""A chat in no protocol's form: its messages as chat templates read them, each with its field of the request."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic_core import from_json

from toolkit.chat.tools import Tool, ToolChoice
from toolkit.sentences import shown
from toolkit.serving.errors import Json, RequestError


class TemplateMessage(Protocol):
    """What the server's tokenizer needs of a message."""

    @property
    def num_characters(self) -> int:
        """Characters of its text."""

    @property
    def images(self) -> list[str]:
        """URLs of its images, in order."""

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it."""


@dataclass(frozen=True)
class Image:
    """An image in a message; ``url`` is a data URL, or a ``file://`` URL where the server allows local files."""

    url: str


@dataclass
class ChatMessage:
    """One message.

    Args:
        role: "system", "user", "assistant" or "tool".
        where: the field of the request that it comes from, for errors.
        content: text and images, in order.
        fields: further keys for the template: ``reasoning_content``, ``tool_calls``, ``tool_call_id``, ``name``.
    """

    role: str
    where: str
    content: list[str | Image] = field(default_factory=list)
    fields: Json = field(default_factory=dict)

    @property
    def num_characters(self) -> int:
        return sum(len(part) for part in self.content if isinstance(part, str))

    @property
    def images(self) -> list[str]:
        return [part.url for part in self.content if isinstance(part, Image)]

    def for_template(self) -> dict[str, Any]:
        content: Any = "".join(part for part in self.content if isinstance(part, str))
        if self.images:
            content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                       for part in self.content]  # fmt: skip
        return {"role": self.role, "content": content, **self.fields}


@dataclass(frozen=True)
class Chat:
    """A chat that asks for a reply.

    Args:
        messages: at least one.
        tools: that the template shows.
        choice: among them.
        variables: of the template, such as ``enable_thinking``.
        prefilled: the last message is the assistant's, and the reply continues it.
    """

    messages: list[ChatMessage]
    tools: list[Tool] = field(default_factory=list)
    choice: ToolChoice = field(default_factory=ToolChoice)
    variables: Json = field(default_factory=dict)
    prefilled: bool = False

    @property
    def continued(self) -> str:
        """What the prompt has of the reply already."""
        last = self.messages[-1].content if self.prefilled else []
        return "".join(part for part in last if isinstance(part, str))


def arguments_of(text: str) -> Json:
    """The object of a call's arguments, for protocols that have no text.

    Where the model stopped inside them, what they have so far, strings that it had begun included.
    """
    try:
        found = from_json(text or "{}", allow_inf_nan=False, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def merged(
    messages: Sequence[ChatMessage], roles: Sequence[str] = ("system", "user", "assistant")
) -> list[ChatMessage]:
    """The messages, neighbours of one of the ``roles`` as one: many templates want roles in turns."""
    found: list[ChatMessage] = []
    for one in messages:
        last = found[-1] if found else None
        if last is None or last.role != one.role or one.role not in roles:
            found.append(ChatMessage(one.role, one.where, list(one.content), dict(one.fields)))
            continue
        last.content += ["\n"] * bool(last.content and one.content) + one.content
        for name, value in one.fields.items():
            last.fields[name] = last.fields[name] + value if name in last.fields else value
    return found


def system_first(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The messages behind one system message of all instructions that stand before any other message."""
    count = next((at for at, one in enumerate(messages) if one.role != "system"), len(messages))
    return [*merged(messages[:count]), *messages[count:]]


def check_results(messages: Sequence[ChatMessage]) -> None:
    """Raise RequestError for the result of a call that no message before it makes."""
    called: set[str] = set()
    for one in messages:
        called |= {call["id"] for call in one.fields.get("tool_calls", ())}
        asked = one.fields.get("tool_call_id")
        if asked is not None and asked not in called:
            message = f"'{one.where}' has the result of a tool call {shown(asked)} that no message makes."
            raise RequestError(message, one.where)
