"""Tool calls whose arguments are literals of another language than JSON: Python's, or Gemma's.

A call is read whole and then written as JSON: until its end nobody knows that it is one.
"""

import ast
import json
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.chat.reply.calls import CallFormat, CallWriter, GrammarTerms
from toolkit.chat.reply.literal_grammar import Dialect, literal_grammar
from toolkit.chat.reply.source import Malformed, Reading, Source, expect, peek, short_name, space, until
from toolkit.chat.tools import Tool

_PYTHON_MARKS = re.compile(r"""["'()\[\]{}]""")
_ENDS_OF = {'"': re.compile(r'"|\\.?', re.DOTALL), "'": re.compile(r"'|\\.?", re.DOTALL)}


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        raise Malformed from None


@dataclass(frozen=True, kw_only=True)
class PythonCalls(CallFormat):
    """A list of calls in Python: ``[name(key=value), ...]``."""

    bare: str = "["

    def read(self, source: Source, calls: CallWriter, marker: str) -> Reading:
        yield from space(source)
        yield from expect(source, "[")
        while True:
            yield from space(source)
            name, _ = yield from short_name(source, ("(",))
            if not marker:
                calls.check_known(name)
            calls.whole(name, python_arguments((yield from _python_text(source))))
            yield from space(source)
            if (yield from expect(source, ",", "]")) == "]":
                break
        if marker and self.ends:
            yield from space(source)
            if (yield from peek(source)):
                yield from expect(source, *self.ends)

    def calls_grammar(self, tools: Sequence[Tool], several: bool, terms: GrammarTerms) -> str:
        one = terms.rule("call", " | ".join(self._one(tool, terms) for tool in tools))
        more = f" ({terms.text(', ')} {one})*" if several else ""
        first, last = (self.begins or ("",))[0], (self.ends or ("",))[0]
        return f"{terms.text(first + '[')} {one}{more} {terms.text(']' + last)}"

    def _one(self, tool: Tool, terms: GrammarTerms) -> str:
        arguments = literal_grammar(PYTHON, tool, terms)
        return f"{terms.text(tool.name + '(')} {arguments} {terms.text(')')}"


PYTHON = Dialect(
    true="True", false="False", null="None", quote='"', escapes=True, pair="{key}=", key_quote='"', gap=" "
)


def _python_text(source: Source) -> Generator[None, None, str]:
    """Read up to the parenthesis that closes the arguments, and it; the text before it."""
    depth, quote, parts = 1, "", []
    while True:
        match = (_ENDS_OF[quote] if quote else _PYTHON_MARKS).search(source.text, source.at)
        if match is None or match.group() == "\\":
            if source.ended:
                raise Malformed
            end = len(source.text) if match is None else match.start()
            parts.append(source.take(end - source.at))
            yield
            continue
        parts.append(source.take(match.end() - source.at))
        mark = match.group()
        if quote:
            quote = "" if mark == quote else quote
        elif mark in "\"'":
            quote = mark
        else:
            depth += 1 if mark in "([{" else -1
            if depth == 0:
                return "".join(parts)[:-1]


def python_arguments(text: str) -> str:
    """JSON text of the keyword arguments of a call. Raises Malformed for any that are no literals."""
    try:
        call = ast.parse(f"f({text}\n)", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(one.arg is None for one in call.keywords):
            raise Malformed
        return _dumped({str(one.arg): ast.literal_eval(one.value) for one in call.keywords})
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise Malformed from None


@dataclass(frozen=True, kw_only=True)
class GemmaCalls(CallFormat):
    """Calls such as ``call:name{key:value}``, whose strings stand between two markers.

    Args:
        quote: the marker of strings.
    """

    quote: str

    def read(self, source: Source, calls: CallWriter, marker: str) -> Reading:
        yield from expect(source, "call:")
        name, _ = yield from short_name(source, ("{",))
        parts = ["{"]
        depth, inside = 1, False
        while depth:
            mark = yield from self._mark(source, parts, inside)
            if mark == self.quote:
                inside = not inside
            else:
                depth += 1 if mark == "{" else -1
        calls.whole(name, _dumped(_GemmaValue(self.quote, "".join(parts)).whole()))
        yield from space(source)
        if (yield from peek(source)):
            yield from expect(source, *self.ends)

    def _mark(self, source: Source, parts: list[str], inside: bool) -> Generator[None, None, str]:
        """Read up to a bracket or a quote and that."""
        marks = (self.quote,) if inside else (self.quote, "{", "}")
        mark = yield from until(source, marks, parts.append)
        if mark is None:
            raise Malformed
        parts.append(mark)
        return mark

    def calls_grammar(self, tools: Sequence[Tool], several: bool, terms: GrammarTerms) -> str:
        one = terms.rule("call", " | ".join(self._one(tool, terms) for tool in tools))
        return f"{one}+" if several else one

    def _one(self, tool: Tool, terms: GrammarTerms) -> str:
        dialect = Dialect(true="true", false="false", null="null", quote=self.quote, escapes=False, pair="{key}:")
        arguments = literal_grammar(dialect, tool, terms)
        head = f"{self.begins[0]}call:{tool.name}{{"
        return f"{terms.text(head)} {arguments} {terms.text('}' + self.ends[0])}"


class _GemmaValue:
    """Reads one value."""

    _BARE = re.compile(r"[^,{}\[\]:]+")

    def __init__(self, quote: str, text: str) -> None:
        self._quote, self._text, self._at = quote, text, 0

    def whole(self) -> Any:
        try:
            value = self._value()
        except (ValueError, RecursionError):
            raise Malformed from None
        if self._at != len(self._text):
            raise Malformed
        return value

    def _next(self, mark: str) -> bool:
        """Whether ``mark`` comes next, behind whitespace; it is read then."""
        while self._text[self._at : self._at + 1] in (" ", "\n", "\t", "\r"):
            self._at += 1
        if not self._text.startswith(mark, self._at):
            return False
        self._at += len(mark)
        return True

    def _value(self) -> Any:
        if self._next(self._quote):
            end = self._text.index(self._quote, self._at)
            text, self._at = self._text[self._at : end], end + len(self._quote)
            return text
        if self._next("{"):
            pairs: dict[str, Any] = {}
            while not self._next("}"):
                key = self._value()
                if not isinstance(key, str):
                    key = json.dumps(key)
                self._need(":")
                pairs[key] = self._value()
                self._next(",")
            return pairs
        if self._next("["):
            items: list[Any] = []
            while not self._next("]"):
                items.append(self._value())
                self._next(",")
            return items
        match = self._BARE.match(self._text, self._at)
        if match is None:
            raise ValueError
        self._at = match.end()
        bare = match.group().strip()
        try:
            return json.loads(bare)
        except ValueError:
            return bare

    def _need(self, mark: str) -> None:
        if not self._next(mark):
            raise ValueError
