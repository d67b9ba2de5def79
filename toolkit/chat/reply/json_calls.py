"""Tool calls whose arguments are JSON text, which streams as the model writes it."""

import json
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.chat.reply.calls import CallFormat, CallWriter, GrammarTerms
from toolkit.chat.reply.source import (
    Malformed,
    Reading,
    Source,
    checked_name,
    collect,
    expect,
    literal,
    peek,
    short_name,
    space,
)
from toolkit.chat.tools import Tool

_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'"|\\.?', re.DOTALL)
_SCALAR = re.compile(r"[-+.\w]*")


def json_value(source: Source, write: Callable[[str], None]) -> Reading:
    """Read one JSON value and hand its text to ``write`` in parts.

    Brackets are counted and strings are read; a reader of the text finds what else may be wrong.

    Raises:
        Malformed: no value begins here, or the text ends inside it.
    """
    first = yield from peek(source)
    if not first or first not in '{["':
        yield from _scalar(source, write)
        return
    depth, inside = 0, False
    while True:
        match = (_INSIDE if inside else _OUTSIDE).search(source.text, source.at)
        if match is None or match.group() == "\\":
            end = len(source.text) if match is None else match.start()
            if end > source.at:
                write(source.take(end - source.at))
            if source.ended:
                raise Malformed
            yield
            continue
        write(source.take(match.end() - source.at))
        mark = match.group()
        if mark == '"':
            inside = not inside
        elif not inside:
            depth += 1 if mark in "{[" else -1
        if not inside and depth <= 0:
            return


def _scalar(source: Source, write: Callable[[str], None]) -> Reading:
    while True:
        match = _SCALAR.match(source.text, source.at)
        assert match is not None
        if match.end() < len(source.text) or source.ended:
            break
        yield
    text = source.take(match.end() - source.at)
    try:
        json.loads(text)
    except ValueError:
        raise Malformed from None
    write(text)


def _parsed(source: Source) -> Generator[None, None, Any]:
    parts: list[str] = []
    yield from json_value(source, parts.append)
    try:
        return json.loads("".join(parts), strict=False)
    except (ValueError, RecursionError):
        raise Malformed from None


def arguments_text(value: Any) -> str:
    """Arguments that are not written as an object: JSON text inside a string, or none. Raises Malformed for others."""
    if value is None:
        return "{}"
    if isinstance(value, str):
        try:
            value, text = json.loads(value or "{}"), value or "{}"
        except ValueError:
            raise Malformed from None
        if isinstance(value, dict):
            return text
    raise Malformed


@dataclass(frozen=True, kw_only=True)
class JsonCalls(CallFormat):
    """Calls as JSON objects that have the function's name: ``{"name": ..., "arguments": {...}}``.

    Args:
        arguments_keys: names of the field of the arguments; grammars write the first.
        lists: whether several calls may be a JSON list.
        separator: between objects that are no list; "" where each has its own marker.
        padding: whitespace inside markers, as the chat template writes it.
        between: text between two calls with markers, as the chat template writes it.
    """

    arguments_keys: tuple[str, ...] = ("arguments", "parameters")
    lists: bool = False
    separator: str = ""
    padding: str = ""
    between: str = ""

    def read(self, source: Source, calls: CallWriter, marker: str) -> Reading:
        known_only = not marker
        yield from space(source)
        if self.lists and (yield from literal(source, ("[",))):
            while True:
                yield from space(source)
                yield from self._call(source, calls, known_only)
                yield from space(source)
                if (yield from expect(source, ",", "]")) == "]":
                    break
        else:
            yield from self._call(source, calls, known_only)
            while self.separator:
                yield from space(source)
                if not (yield from literal(source, (self.separator,))):
                    source.rewind()
                    break
                yield from space(source)
                yield from self._call(source, calls, known_only)
        if self.ends and marker:
            yield from space(source)
            if (yield from peek(source)):
                yield from expect(source, *self.ends)

    def _call(self, source: Source, calls: CallWriter, known_only: bool) -> Reading:
        name, arguments = yield from self._object(source, calls, known_only, None)
        if calls.open:
            calls.end()
            return
        if name is None:
            raise Malformed
        calls.whole(name, "{}" if arguments is None else arguments)

    def _object(
        self, source: Source, calls: CallWriter, known_only: bool, name: str | None
    ) -> Generator[None, None, tuple[str | None, str | None]]:
        """(name, arguments) of an object; the arguments are written, not returned, where the name comes first."""
        arguments: str | None = None
        yield from expect(source, "{")
        while True:
            yield from space(source)
            if (yield from peek(source)) != '"':
                raise Malformed
            key = yield from _parsed(source)
            yield from space(source)
            yield from expect(source, ":")
            yield from space(source)
            first = yield from peek(source)
            if key == "name":
                value = yield from _parsed(source)
                if not isinstance(value, str) or name is not None:
                    raise Malformed
                name = checked_name(value)
                if known_only:
                    calls.check_known(name)
            elif key in self.arguments_keys and first == "{":
                if name is not None and not calls.open:
                    calls.begin(name)
                    yield from json_value(source, calls.arguments)
                else:
                    parts: list[str] = []
                    yield from json_value(source, parts.append)
                    arguments = "".join(parts)
            elif key in self.arguments_keys:
                arguments = arguments_text((yield from _parsed(source)))
            elif key == "function" and first == "{":
                name, arguments = yield from self._object(source, calls, known_only, name)
            elif known_only and key not in ("type", "id", "function"):
                raise Malformed
            else:
                yield from _parsed(source)
            yield from space(source)
            if (yield from expect(source, ",", "}")) == "}":
                return name, arguments

    def calls_grammar(self, tools: Sequence[Tool], several: bool, terms: GrammarTerms) -> str:
        one = terms.rule("call", " | ".join(self._one(tool, terms) for tool in tools))
        marked = bool(self.begins) and not self.bare
        begin, end = (self.begins[0] if marked else ""), (self.ends[0] if self.ends and marked else "")
        if self.lists:
            more = f' ("," /[ ]?/ {one})*' if several else ""
            body = f'{terms.text(begin + self.padding)} "[" {one}{more} "]" {terms.text(self.padding + end)}'
        elif self.separator:
            more = f" ({terms.text(self.separator + ' ')} {one})*" if several else ""
            body = f"{terms.text(begin)} {one}{more} {terms.text(end)}"
        else:
            last = terms.text(self.padding + end)
            more = f" ({terms.text(self.between + begin + self.padding)} {one} {last})*" if several else ""
            body = f"{terms.text(begin + self.padding)} {one} {last}{more}"
        return body

    def _one(self, tool: Tool, terms: GrammarTerms) -> str:
        head = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{self.arguments_keys[0]}": '
        return f'{terms.text(head)} {terms.json(dict(tool.parameters))} "}}"'


@dataclass(frozen=True, kw_only=True)
class NamedJsonCalls(CallFormat):
    """Calls as a function's name, a marker, and the arguments as JSON.

    Args:
        section: markers around all calls of a reply.
        before_name: text between the call's marker and the name.
        name_ends: markers behind the name, the first for grammars; ``{`` begins the arguments.
        id_end: marker behind which an id stands, before the last of ``name_ends``.
        fence: text around the arguments.
        prefix: what may stand before a name and is no part of it.
        suffix: a regular expression of what may stand behind a name and is no part of it.
        between: text between two calls, as the chat template writes it.
        otherwise: the syntax where a bracket follows the marker.
        writes_otherwise: whether grammars are of that one.
    """

    section: tuple[str, str] | None = None
    before_name: str = ""
    name_ends: tuple[str, ...]
    id_end: str = ""
    fence: tuple[str, str] = ("", "")
    prefix: str = ""
    suffix: str = ""
    between: str = ""
    otherwise: JsonCalls | None = None
    writes_otherwise: bool = False

    def read(self, source: Source, calls: CallWriter, marker: str) -> Reading:
        if self.otherwise is not None:
            yield from space(source)
            if (yield from peek(source)) in ("[", "{"):
                yield from self.otherwise.read(source, calls, marker)
                return
        begin = self.begins[-1]
        if self.section is not None and marker == self.section[0]:
            yield from space(source)
            yield from expect(source, begin)
        while True:
            yield from self._call(source, calls)
            yield from space(source)
            closing = (self.section[1],) if self.section is not None else ()
            next_marker = yield from literal(source, (begin, *closing))
            if next_marker is None:
                source.rewind()
            if next_marker != begin:
                return

    def _call(self, source: Source, calls: CallWriter) -> Reading:
        if self.before_name:
            yield from space(source)
            yield from expect(source, self.before_name)
        name, end = yield from short_name(source, (*self.name_ends, *([self.id_end] if self.id_end else [])))
        if self.prefix or self.suffix:
            name = checked_name(re.sub(f"{self.suffix}$" if self.suffix else "$", "", name.removeprefix(self.prefix)))
        if end == self.id_end and end:
            yield from collect(source, self.name_ends[:1])
        if end == "{":
            source.at -= 1
        yield from space(source)
        if self.fence[0]:
            yield from literal(source, (self.fence[0].strip(),))
            yield from space(source)
        first = yield from peek(source)
        if first == "{":
            calls.begin(name)
            yield from json_value(source, calls.arguments)
            calls.end()
        elif first and not (self.ends or self.section):
            raise Malformed
        else:
            calls.whole(name, "{}")
        yield from space(source)
        if self.fence[1]:
            yield from literal(source, (self.fence[1].strip(),))
            yield from space(source)
        if self.ends:
            if (yield from peek(source)):
                yield from expect(source, *self.ends)
            source.keep()

    def calls_grammar(self, tools: Sequence[Tool], several: bool, terms: GrammarTerms) -> str:
        if self.writes_otherwise and self.otherwise is not None:
            return self.otherwise.calls_grammar(tools, several, terms)
        first, last = self.section or ("", "")
        one = terms.rule("call", " | ".join(self._one(tool, terms, first) for tool in tools))
        more = ""
        if several:
            # No text may be the beginning of another that may come in the same position.
            more = f" {terms.rule('more', ' | '.join(self._one(tool, terms, self.between) for tool in tools))}*"
        return f"{one}{more} {terms.text(last)}"

    def _one(self, tool: Tool, terms: GrammarTerms, before: str) -> str:
        head = before + self.begins[-1] + self.before_name + self.prefix + tool.name
        behind = self.name_ends[0] + self.fence[0]
        named = f"{terms.text(head)} /{self.suffix}/ {terms.text(behind)}" if self.suffix else terms.text(head + behind)
        end = self.fence[1] + (self.ends[0] if self.ends else "")
        return f"{named} {terms.json(dict(tool.parameters))} {terms.text(end)}"
