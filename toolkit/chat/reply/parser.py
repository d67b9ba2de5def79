"""The output of a model as reasoning, content and tool calls, while it is written."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from toolkit.chat.reply.calls import CallFormat, CallWriter
from toolkit.chat.reply.events import ContentText, Event, ReasoningText, Reply
from toolkit.chat.reply.source import Malformed, Reading, Source, earliest, held_back, peek, space, until
from toolkit.chat.tools import Tool, new_call_id

_SPACE = " \t\r\n"


class OutputParser(Protocol):
    """Reads one reply; ``ReplyParser`` documents the methods."""

    def feed(self, text: str) -> list[Event]: ...
    def finish(self) -> list[Event]: ...


@dataclass(frozen=True)
class ReasoningFormat:
    """How a model marks its reasoning.

    Args:
        begin: marker; a prompt that ends with it has begun the reasoning already.
        end: marker.
    """

    begin: str
    end: str

    def begun_by(self, prompt: str) -> bool:
        """Whether a prompt ends inside reasoning."""
        return prompt.rstrip().endswith(self.begin.rstrip())

    def ended_by(self, prompt: str) -> bool:
        """Whether a prompt ends with reasoning that is over, as where a request turns reasoning off."""
        return prompt.rstrip().endswith(self.end.rstrip())


class SteppedParser:
    """A parser whose reading of the text is a generator that yields where it waits for more.

    A subclass makes source, events and reading.
    """

    _source: Source
    _events: list[Event]
    _reading: Reading | None

    def feed(self, text: str) -> list[Event]:
        """Events of more text."""
        self._source.feed(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """Events of the end of the text; nothing is fed after it."""
        self._source.ended = True
        return self._advance()

    def _advance(self) -> list[Event]:
        if self._reading is not None and next(self._reading, self) is self:
            self._reading = None
        events, self._events[:] = joined(self._events), []
        return events


class ReplyParser(SteppedParser):
    """Reads one reply.

    All events together are the same however the text was cut. Text is held back only while it may be the beginning of
    a marker, or of a call whose function is not known yet. Whitespace around reasoning and calls is left out. What
    begins as a call and turns out to be none is content.

    Args:
        calls: syntax of tool calls; None reads none.
        reasoning: how reasoning is marked; None takes it for content.
        tools: that the reply may call.
        begun: whether the prompt ends inside reasoning (``ReasoningFormat.begun_by``).
        most_calls: further ones are left out; None bounds none.
    """

    def __init__(
        self,
        calls: CallFormat | None = None,
        reasoning: ReasoningFormat | None = None,
        tools: Sequence[Tool] = (),
        begun: bool = False,
        most_calls: int | None = None,
    ) -> None:
        self._format, self._reasoning, self._begun = calls, reasoning, begun and reasoning is not None
        self._source = Source()
        self._events = []
        self._calls = CallWriter(self._source, self._events.append, self._new_id, tools, most_calls)
        self._pending_space: list[str] = []
        self._written = False  # content, so that whitespace before more of it counts
        self._after_call = False
        self._content: Callable[[str], None] = self._write_content
        self._reading = self._read()

    def _new_id(self, name: str, index: int) -> str:
        if self._format is not None and self._format.id_of is not None:
            return self._format.id_of.format(name=name, index=index)
        return new_call_id(self._format.id_length if self._format is not None else None)

    def _read(self) -> Reading:
        source = self._source
        if self._begun:
            yield from self._read_reasoning()
        begins = self._format.begins if self._format is not None else ()
        marks = [*begins, *([self._reasoning.begin] if self._reasoning is not None else [])]
        if not marks and not (self._format is not None and self._format.bare):
            while not (source.ended and source.exhausted):
                if not source.exhausted:
                    self._write_content(source.take(len(source.rest)))
                yield
            return
        if self._format is not None and self._format.bare:
            yield from self._read_bare(self._format)
        while True:
            marker = yield from self._until_marker(marks)
            if marker is None:
                break
            if self._reasoning is not None and marker == self._reasoning.begin:
                source.at += len(marker)
                self._pending_space = []
                yield from self._read_reasoning()
                if self._format is not None and self._format.bare and not self._written:
                    yield from self._read_bare(self._format)
            else:
                yield from self._read_calls(marker)

    def _until_marker(self, marks: Sequence[str]) -> Generator[None, None, str | None]:
        """Content up to a marker, which is not read; None at the end of the text."""
        source = self._source
        while True:
            match = earliest(source.text, marks, source.at)
            end = len(source.text) if match is None else match[0]
            if match is None and not source.ended:
                end -= held_back(source.text, marks, source.at)
            if end > source.at:
                self._write_content(source.take(end - source.at))
            if match is not None:
                grows = any(one != match[1] and one.startswith(source.rest) for one in marks)
                if not grows or source.ended:
                    return match[1]
            elif source.ended:
                if not self._after_call:
                    self._flush_space()
                return None
            yield

    def _read_reasoning(self) -> Reading:
        assert self._reasoning is not None
        source = self._source
        held: list[str] = []
        yield from space(source)

        def write(text: str) -> None:
            kept = text.rstrip(_SPACE)
            if kept:
                self._events.append(ReasoningText("".join([*held, kept])))
                held.clear()
            held.append(text[len(kept) :])

        yield from until(source, [self._reasoning.end], write)
        yield from space(source)

    def _read_bare(self, form: CallFormat) -> Reading:
        """Calls without a marker, with which a reply begins."""
        source = self._source
        source.keep()
        yield from space(source)
        first = yield from peek(source)
        if not first or first not in form.bare:
            source.rewind()
            return
        try:
            yield from form.read(source, self._calls, "")
        except Malformed:
            self._give_up()
        source.release()
        self._after_call = self._calls.count > 0

    def _read_calls(self, marker: str | None) -> Reading:
        source, form = self._source, self._format
        assert form is not None
        while marker is not None:
            source.keep()
            source.at += len(marker)
            before = self._calls.count
            try:
                yield from form.read(source, self._calls, marker)
            except Malformed:
                self._give_up()
                if self._calls.count == before:
                    self._write_content(source.take(len(marker)))
                    source.release()
                    return
                self._pending_space = []
                # The rest of what the marker opened: what is no call is content.
                marker = (yield from until(source, [*form.ends, *form.begins], self._content)) if form.ends else None
                if marker in form.begins:
                    source.at -= len(marker)
                    continue
            marker = None
        source.release()
        self._pending_space, self._after_call = [], True

    def _give_up(self) -> None:
        if self._calls.open:
            self._calls.end(complete=False)
        self._source.rewind()

    def _write_content(self, text: str) -> None:
        """Content, whose last whitespace waits for what follows it."""
        kept = text.rstrip(_SPACE) if self._format is not None or self._reasoning is not None else text
        if kept:
            behind, kept = text[len(kept) :], "".join([*self._pending_space, kept])
            self._pending_space = []
            if self._after_call and not self._written:
                kept = kept.lstrip(_SPACE)
            self._events.append(ContentText(kept))
            self._written, self._after_call = True, False
            text = behind
        if text:
            self._pending_space.append(text)

    def _flush_space(self) -> None:
        if text := "".join(self._pending_space):
            self._events.append(ContentText(text))
            self._pending_space = []


def joined(events: Sequence[Event]) -> list[Event]:
    """The events, texts of one sort that follow one another joined."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, ContentText | ReasoningText) and type(last) is type(event):
            joined[-1] = type(event)(last.text + event.text)
        elif hasattr(event, "text") and type(last) is type(event) and last.index == event.index:  # type: ignore
            joined[-1] = type(event)(event.index, last.text + event.text)  # type: ignore
        else:
            joined.append(event)
    return joined


def parse_reply(parser: OutputParser, text: str) -> Reply:
    """The reply of a whole text."""
    return Reply().add(parser.feed(text)).add(parser.finish())
