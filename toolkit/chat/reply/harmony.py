"""gpt-oss' Harmony: a reply is messages, each behind a header that has its channel and, of a call, its recipient.

``<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.NAME
<|constrain|>json<|message|>{...}<|call|>``, and ``<|channel|>final<|message|>...<|return|>`` in the place of a call.
"""

import json
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from toolkit.chat.reply.calls import CallFormat, CallWriter, GrammarTerms
from toolkit.chat.reply.events import ContentText, Event, ReasoningText
from toolkit.chat.reply.parser import ReasoningFormat, SteppedParser
from toolkit.chat.reply.source import Reading, Source, until
from toolkit.chat.tools import Tool, new_call_id

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKERS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)
ANALYSIS, COMMENTARY, FINAL = "analysis", "commentary", "final"
FUNCTIONS = "functions."
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_NEXT = f"{END}{START}assistant"


class Header(NamedTuple):
    """What a message's header says: its channel, and the recipient of a call or ""."""

    channel: str
    recipient: str

    @classmethod
    def read(cls, text: str) -> "Header":
        """The header in ``text``, which ends before ``<|message|>``."""
        recipient, channel = _RECIPIENT.search(text), _CHANNEL.search(text)
        return cls(channel[1] if channel else FINAL, recipient[1] if recipient else "")


def open_message(prompt: str) -> Header | None:
    """The header of the message that a prompt ends inside; None where it ends before one."""
    start, body = prompt.rfind(START), prompt.rfind(MESSAGE)
    if body <= max(start, *(prompt.rfind(mark) for mark in (END, CALL, RETURN))):
        return None
    return Header.read(prompt[max(start, 0) : body])


@dataclass(frozen=True, kw_only=True)
class HarmonyCalls(CallFormat):
    """Calls as messages to ``functions.NAME``; ``HarmonyParser`` reads them, for a reply is messages throughout."""

    begins: tuple[str, ...] = (f"{CHANNEL}{COMMENTARY} to={FUNCTIONS}",)
    ends: tuple[str, ...] = (CALL,)

    def calls_grammar(self, tools: Sequence[Tool], several: bool, terms: GrammarTerms) -> str:
        """One call: the model stops behind it."""
        head, behind = self.begins[0], f" {CONSTRAIN}json{MESSAGE}"
        return terms.rule(
            "call",
            " | ".join(f"{terms.text(head + one.name + behind)} {terms.json(dict(one.parameters))}" for one in tools),
        )


@dataclass(frozen=True)
class HarmonyReasoning(ReasoningFormat):
    """Reasoning as messages in the channel ``analysis``."""

    begin: str = f"{CHANNEL}{ANALYSIS}{MESSAGE}"
    end: str = _NEXT

    def ended_by(self, prompt: str) -> bool:
        """Whether a prompt ends inside the final message, as where a request continues one."""
        header = open_message(prompt)
        return header is not None and header.channel != ANALYSIS


def harmony_start(terms: GrammarTerms, prompt: str, last: Sequence[str], free: bool) -> str:
    """The body of a grammar's first rule: messages of reasoning and of commentary, and a last one.

    Args:
        terms: of the grammar.
        prompt: its end at least.
        last: bodies of which one is the end of the reply: calls, or the content behind ``content_head``.
        free: whether the last message may be any text, too.
    """
    behind = terms.until(_NEXT)
    heads = " | ".join(f"{terms.text(CHANNEL + name + MESSAGE)} {behind}" for name in (ANALYSIS, COMMENTARY))
    any_text = terms.rule("ANY", "/(?s:.*)/")
    ends = [*last, *([f"{terms.text(f'{CHANNEL}{FINAL}{MESSAGE}')} {any_text}"] if free else [])]
    before = f"{behind} " if open_message(prompt) is not None else ""
    return f"{before}({heads})* ({' | '.join(ends)})"


def content_head(terms: GrammarTerms) -> str:
    """What stands before the content of a reply."""
    return terms.text(f"{CHANNEL}{FINAL}{MESSAGE}")


class HarmonyParser(SteppedParser):
    """Reads one reply as ``ReplyParser`` does.

    Messages of the channel ``analysis`` are reasoning, messages to a function are calls, all others are content; a line
    break stands between two of a sort. A header that the output stops in is left out, and text without one is content.

    Args:
        prompt: its end at least; the reply may continue a message.
        tools: that the reply may call.
        reasoning: whether reasoning is apart; False takes it for content.
        calls: whether calls are read; False takes their arguments for content.
        most_calls: further ones are left out; None bounds none.
    """

    def __init__(
        self,
        prompt: str,
        tools: Sequence[Tool] = (),
        reasoning: bool = True,
        calls: bool = True,
        most_calls: int | None = None,
    ) -> None:
        self._apart, self._reads_calls = reasoning, calls
        self._source = Source()
        self._events = []
        self._calls = CallWriter(
            self._source, self._events.append, lambda name, index: new_call_id(), tools, most_calls
        )
        self._reading = self._read(open_message(prompt))
        self._written: set[type[Event]] = set()

    def _read(self, header: Header | None) -> Reading:
        first = header is None
        while True:
            if header is None:
                header = yield from self._header(first)
            if header is None:
                return
            if not (yield from self._body(header)):
                return
            header, first = None, False

    def _header(self, first: bool) -> Generator[None, None, Header | None]:
        """The header of the next message, behind text that is in none; None at the end of the text."""
        source = self._source
        if not (first and (yield from self._names_a_recipient())):
            write = self._writer(ContentText)
            marker = yield from until(source, (START, CHANNEL), write)
            if marker is None:
                return None
            source.at -= len(marker)
        parts: list[str] = []
        found = yield from until(source, (MESSAGE,), parts.append)
        return Header.read("".join(parts)) if found is not None else None

    def _names_a_recipient(self) -> Generator[None, None, bool]:
        """Whether the reply begins with a header's `` to=``: the prompt has ``<|start|>assistant``."""
        source = self._source
        while True:
            begun = source.rest.lstrip()
            if begun.startswith("to=") or source.ended or not "to=".startswith(begun):
                return begun.startswith("to=")
            yield

    def _body(self, header: Header) -> Generator[None, None, bool]:
        """Read a message's text and the marker behind it; whether more may follow."""
        ends = (END, CALL, RETURN, START)
        if header.recipient and self._reads_calls:
            parts: list[str] = []
            self._calls.begin(header.recipient.removeprefix(FUNCTIONS))

            def write(text: str) -> None:
                parts.append(text)
                self._calls.arguments(text)

            marker = yield from until(self._source, ends, write)
            if not "".join(parts).strip() and marker is not None:
                self._calls.arguments("{}")
            self._calls.end(marker is not None or _is_object("".join(parts)))
            self._source.release()
        else:
            reasons = self._apart and header.channel == ANALYSIS
            marker = yield from until(self._source, ends, self._writer(ReasoningText if reasons else ContentText))
        if marker == START:
            self._source.at -= len(marker)
        return marker is not None

    def _writer(self, kind: type[ContentText] | type[ReasoningText]) -> Callable[[str], None]:
        """Writes texts of one message, behind a line break where there was one of its kind before."""
        again = kind in self._written

        def write(text: str) -> None:
            nonlocal again
            self._events.append(kind(f"\n{text}" if again else text))
            again = False
            self._written.add(kind)

        return write


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
