"""What every syntax of tool calls has, and how one writes the calls that it reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from toolkit.chat.reply.events import CallArguments, CallBegin, CallEnd, Event
from toolkit.chat.reply.source import Malformed, Reading, Source
from toolkit.chat.tools import Tool


class CallWriter:
    """Writes the events of calls.

    Attributes:
        open: whether a call has begun and not ended.
        count: calls that have begun.

    Args:
        source: that calls are read from; once a call has begun, what came before is not given back.
        emit: takes events.
        new_id: makes the id of the next call, from its function's name and its index.
        tools: of the request.
        most: calls of a reply; further ones are left out. None bounds none.
    """

    def __init__(
        self,
        source: Source,
        emit: Callable[[Event], None],
        new_id: Callable[[str, int], str],
        tools: Sequence[Tool],
        most: int | None = None,
    ) -> None:
        self._source, self._emit, self._new_id, self._most = source, emit, new_id, most
        self._tools = {tool.name: tool for tool in tools}
        self.open, self.count = False, 0

    def tool(self, name: str) -> Tool | None:
        """The tool of that name."""
        return self._tools.get(name)

    def check_known(self, name: str) -> None:
        """Raise Malformed for a name that no tool has: text without a marker is a call of a tool only."""
        if name not in self._tools:
            raise Malformed

    def begin(self, name: str) -> None:
        self._source.release()
        self.open = True
        self.count += 1
        self._write(lambda at: CallBegin(at, self._new_id(name, at), name))

    def arguments(self, text: str) -> None:
        if text:
            self._write(lambda at: CallArguments(at, text))

    def end(self, complete: bool = True) -> None:
        self.open = False
        self._write(lambda at: CallEnd(at, complete))
        self._source.keep()

    def whole(self, name: str, arguments: str) -> None:
        """A call that is read in one go."""
        self.begin(name)
        self.arguments(arguments)
        self.end()

    def _write(self, event: Callable[[int], Event]) -> None:
        if self._most is None or self.count <= self._most:
            self._emit(event(self.count - 1))


class GrammarTerms(Protocol):
    """Terms of a grammar in Lark."""

    def text(self, text: str) -> str:
        """A literal text, in which special tokens are written as themselves."""

    def json(self, schema: dict[str, object]) -> str:
        """JSON text of a schema."""

    def rule(self, name: str, body: str) -> str:
        """A further rule (lower case) or terminal (upper case) of the grammar; its name, made unique."""

    def named(self, name: str, body: str) -> str:
        """A further rule of exactly that name, which its own body may use; the name."""

    def until(self, text: str) -> str:
        """Any text up to ``text``, and that."""


@dataclass(frozen=True, kw_only=True)
class CallFormat:
    """A syntax of tool calls; subclasses read and describe it.

    Args:
        begins: markers of which each opens one or more calls.
        ends: markers that close what ``begins`` open; none where the call has no such marker.
        bare: first characters of replies that are calls without a marker.
        id_length: characters of ids of calls, for chat templates that check them.
        id_of: makes ids in the place of random ones, ``{name}`` and ``{index}`` replaced.
    """

    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    bare: str = ""
    id_length: int | None = None
    id_of: str | None = None

    def read(self, source: Source, calls: CallWriter, marker: str) -> Reading:
        """Read what follows ``marker``, one of ``begins`` or "" at the first character of bare calls.

        Raises:
            Malformed: the text is no call. Where a call has begun before, only what follows it is given back.
        """
        raise NotImplementedError

    def calls_grammar(self, tools: Sequence[Tool], several: bool, terms: GrammarTerms) -> str:
        """A rule's body that allows one call, or one or more, of ``tools`` and nothing else.

        Raises:
            ToolkitError: a schema that this syntax cannot enforce.
        """
        raise NotImplementedError
