"""What a reply is made of, as it comes and as a whole."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from toolkit.chat.tools import ToolCall


@dataclass(frozen=True)
class ReasoningText:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class ContentText:
    """More of the content."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A tool call begins.

    Args:
        index: of the call in the reply, from 0.
        id: of the call.
        name: of the function.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """A tool call ends.

    Args:
        index: of the call.
        complete: False where the model stopped or erred inside the arguments, which may then be no JSON.
    """

    index: int
    complete: bool = True


Event = ReasoningText | ContentText | CallBegin | CallArguments | CallEnd


@dataclass
class Reply:
    """A reply so far.

    Args:
        reasoning: None for none.
        content: "" for none.
        calls: in order.
    """

    reasoning: str | None = None
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, events: Iterable[Event]) -> "Reply":
        """Take events in; the reply itself."""
        for event in events:
            if isinstance(event, ReasoningText):
                self.reasoning = (self.reasoning or "") + event.text
            elif isinstance(event, ContentText):
                self.content += event.text
            elif isinstance(event, CallBegin):
                self.calls.append(ToolCall(event.id, event.name, ""))
            elif isinstance(event, CallArguments):
                call = self.calls[event.index]
                self.calls[event.index] = ToolCall(call.id, call.name, call.arguments + event.text)
        return self
