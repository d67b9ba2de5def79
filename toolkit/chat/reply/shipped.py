"""Replies of models whose tokenizer says how they are read: its ``response_template``, by transformers' parser.

Arguments of calls come whole at the end of a call.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from toolkit.chat.reply.events import (
    CallArguments,
    CallBegin,
    CallEnd,
    ContentText,
    Event,
    ReasoningText,
)
from toolkit.chat.tools import Tool, new_call_id

_REASONING = ("reasoning_content", "reasoning", "thinking")


def texts_of(template: Any) -> list[str]:
    """All strings in a response template, those that are patterns without their backslashes."""
    if isinstance(template, str):
        return [template, template.replace("\\", "")]
    inner = template.values() if isinstance(template, Mapping) else template if isinstance(template, list) else ()
    return [text for one in inner for text in texts_of(one)]


class ShippedParser:
    """Reads one reply as ``ReplyParser`` does.

    What transformers cannot parse is content, as it stands.

    Args:
        tokenizer: with a ``response_template``.
        prompt: of the reply; the template may have begun it.
        tools: that the reply may call.
        reasoning: whether reasoning is apart; False takes it for content.
        calls: whether calls are read; False takes them for content.
        most_calls: further ones are left out; None bounds none.
        new_id: makes ids of calls.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: str,
        tools: Sequence[Tool] = (),
        reasoning: bool = True,
        calls: bool = True,
        most_calls: int | None = None,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._parser: Any = tokenizer.get_response_parser(prefix=prompt, tools=[tool.for_template() for tool in tools])
        self._reasoning, self._reads_calls, self._most, self._new_id = reasoning, calls, most_calls, new_id
        self._text = ""
        self._shown = 0
        """Characters of ``_text`` that events have told of."""
        self._open = self._opened_by(self._parser.initial_events)
        self._count = 0

    def feed(self, text: str) -> list[Event]:
        """Events of more text."""
        self._text += text
        return self._guarded(lambda: self._parser.feed(text))

    def finish(self) -> list[Event]:
        """Events of the end of the text."""
        return self._guarded(lambda: self._parser.finalize()[1])

    def _guarded(self, read: Callable[[], list[dict[str, Any]]]) -> list[Event]:
        if self._parser is None:
            return self._rest()
        events: list[Event] = []
        try:
            for one in read():
                events += self._event(one)
        except Exception:  # transformers' and json's errors, for output that a model wrote
            self._parser = None
            return [*events, *self._rest()]
        return events

    def _rest(self) -> list[Event]:
        text, self._shown = self._text[self._shown :], len(self._text)
        return [ContentText(text)] if text else []

    @staticmethod
    def _opened_by(events: Sequence[Mapping[str, Any]]) -> str | None:
        open_field = None
        for one in events:
            open_field = {"region_open": one["field"], "region_close": None}.get(one["type"], open_field)
        return open_field

    def _event(self, one: Mapping[str, Any]) -> list[Event]:
        field, kind = one["field"], one["type"]
        if field == "tool_calls":
            return self._calls(one["value"]) if kind == "region_close" else []
        if kind != "region_chunk" or one.get("dirty"):
            return []
        at = self._text.find(one["text"], self._shown)
        self._shown = self._shown if at < 0 else at + len(one["text"])
        if field in _REASONING and self._reasoning:
            return [ReasoningText(one["text"])]
        return [ContentText(one["text"])]

    def _calls(self, value: Any) -> list[Event]:
        events: list[Event] = []
        for one in value if isinstance(value, list) else [value]:
            function = one.get("function", one)
            arguments = function.get("arguments", {})
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            if self._most is None or self._count < self._most:
                begin = CallBegin(self._count, self._new_id(), str(function["name"]))
                events += [begin, CallArguments(self._count, text), CallEnd(self._count)]
                self._count += 1
        return events
