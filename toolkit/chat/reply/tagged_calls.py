"""Tool calls whose arguments stand between tags, one after the other, as bare text."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.chat.reply.calls import CallFormat, CallWriter, GrammarTerms
from toolkit.chat.reply.source import (
    Malformed,
    Reading,
    Source,
    collect,
    expect,
    literal,
    peek,
    short_name,
    space,
    until,
)
from toolkit.chat.reply.values import json_of, property_schemas, types_of
from toolkit.chat.tools import Tool
from toolkit.errors import ToolkitError
from toolkit.sentences import shown


@dataclass(frozen=True, kw_only=True)
class TaggedCalls(CallFormat):
    """Calls such as ``<function=NAME><parameter=KEY>VALUE</parameter></function>``.

    Values are strings, unless the tool's schema says otherwise and they read as what it says; one newline at each end
    is no part of them. Strings stream.

    Args:
        section: markers around all calls; ``begins`` has the first.
        name_begin: marker before the name; "" where the name follows ``begins``.
        name_ends: markers behind the name; ``key_begin`` and ``ends`` may be among them.
        key_begin: marker before an argument's name.
        key_ends: markers behind it; JSON follows those in ``json_after``.
        value_begin: marker before the value, where there is one.
        value_end: marker behind it.
        close: marker behind the last argument, where there is one besides ``ends``.
        newline: between tags, as the chat template writes it.
        inside: between a tag and a value, as the chat template writes it.
        between: text between calls, as the chat template writes it.
    """

    name_begin: str = ""
    name_ends: tuple[str, ...]
    key_begin: str
    key_ends: tuple[str, ...]
    value_begin: str = ""
    value_end: str
    close: str = ""
    json_after: tuple[str, ...] = ()
    many: bool = False
    newline: str = "\n"
    inside: str = ""
    between: str = "\n"

    def read(self, source: Source, calls: CallWriter, marker: str) -> Reading:
        inner = bool(self.name_begin) and marker == self.name_begin
        while True:
            if self.name_begin and not inner:
                yield from space(source)
                yield from expect(source, self.name_begin)
            inner = False
            yield from self._call(source, calls)
            yield from space(source)
            if not self.many or not (yield from peek(source)):
                break
            end = yield from expect(source, self.name_begin, *self.ends)
            if end != self.name_begin:
                return
            inner = True
        if marker in self.begins and self.ends and (yield from literal(source, self.ends)) is None:
            if marker == self.name_begin or not (yield from peek(source)):
                return
            raise Malformed

    def _call(self, source: Source, calls: CallWriter) -> Reading:
        name, end = yield from short_name(source, self.name_ends)
        if end in (self.key_begin, *self.ends):
            source.at -= len(end)  # it is read again below
        calls.begin(name)
        tool = calls.tool(name)
        schemas = property_schemas(tool.parameters) if tool is not None else {}
        root = tool.parameters if tool is not None else {}
        opened = False
        while True:
            yield from space(source)
            tag = yield from literal(source, (self.key_begin, *([self.close] if self.close else []), *self.ends))
            if tag in self.ends and tag:
                source.at -= len(tag)
            if tag != self.key_begin:
                break
            key, end = yield from collect(source, self.key_ends)
            if self.value_begin:
                yield from space(source)
                yield from expect(source, self.value_begin)
            calls.arguments(f"{', ' if opened else '{'}{json.dumps(key.strip(), ensure_ascii=False)}: ")
            opened = True
            types = types_of(schemas[key.strip()], root) if key.strip() in schemas else frozenset()
            if end in self.json_after:
                types = frozenset(("object", "array", "boolean", "null", "number", "integer"))
            yield from self._value(source, calls, types)
        if tag is None and source.ended:
            raise Malformed  # the call is cut off
        calls.arguments("}" if opened else "{}")
        calls.end()

    def _value(self, source: Source, calls: CallWriter, types: frozenset[str]) -> Reading:
        # A newline before the tag that ends a value is no part of it.
        ends = (f"\n{self.value_end}", self.value_end)
        if (yield from peek(source)) == "\n":
            rest = yield from literal(source, ends)
            if rest is not None:
                calls.arguments(json_of("", types))
                return
            source.at += 1
        if types <= {"string"}:
            calls.arguments('"')
            end = yield from until(source, ends, lambda text: calls.arguments(_inside_string(text)))
            if end is None:
                raise Malformed
            calls.arguments('"')
            return
        text, _ = yield from collect(source, ends)
        calls.arguments(json_of(text, types))

    def calls_grammar(self, tools: Sequence[Tool], several: bool, terms: GrammarTerms) -> str:
        first = self.begins[0] + (self.newline if self.name_begin else "")
        later = self.between + ("" if self.many else first)
        one = terms.rule("call", " | ".join(self._one(tool, terms, first) for tool in tools))
        more = ""
        if several:
            # No text may be the beginning of another that may come in the same position.
            more = f" {terms.rule('more', ' | '.join(self._one(tool, terms, later) for tool in tools))}*"
        return f"{one}{more}" + (f" {terms.text(self.newline + self.ends[0])}" if self.many else "")

    def _one(self, tool: Tool, terms: GrammarTerms, begin: str) -> str:
        schemas, required = property_schemas(tool.parameters), _required(tool)
        parts = [terms.text(begin + self.name_begin + tool.name + self._behind_name)]
        for name, schema in schemas.items():
            key_end = self.key_ends[0]
            value = self._value_grammar(tool, name, schema, terms)
            if self.json_after and types_of(schema, tool.parameters) != {"string"}:
                key_end = self.json_after[0]
            head = self.key_begin + name + key_end
            if self.value_begin:
                head += self.newline + self.value_begin
            part = f"{terms.text(head + self.inside)} {value}"
            parts.append(part if name in required else f"({part})?")
        parts.append(
            terms.text(self.close + ("" if self.many else (self.newline if self.close else "") + self.ends[0]))
        )
        return " ".join(parts)

    @property
    def _behind_name(self) -> str:
        end = self.name_ends[0]
        return (end if end not in (self.key_begin, *self.ends) else "") + ("" if end == "\n" else self.newline)

    def _value_grammar(self, tool: Tool, name: str, schema: Mapping[str, Any], terms: GrammarTerms) -> str:
        """The value with the marker behind it, up to the next tag."""
        end = self.inside + self.value_end
        types = types_of(schema, tool.parameters)
        if "string" in types or not types:
            _check_plain(schema, f"tools.{tool.name}.{name}")
            values = schema.get("enum", [schema["const"]] if "const" in schema else None)
            if values is not None:
                options = " | ".join(
                    terms.text(value if isinstance(value, str) else json.dumps(value)) for value in values
                )
                return f"({options}) {terms.text(end + self.newline)}"
            return f"{terms.until(end)} {terms.text(self.newline)}"
        definitions = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
        return f"{terms.json({**schema, **definitions})} {terms.text(end + self.newline)}"


def _required(tool: Tool) -> Sequence[str]:
    required = tool.parameters.get("required")
    return required if isinstance(required, (list, tuple)) else ()


_PLAIN = ("type", "title", "description", "default", "examples", "nullable", "enum", "const", "$ref")


def _check_plain(schema: Mapping[str, Any], where: str) -> None:
    """Raise ToolkitError for a string whose schema bare text would not follow."""
    members = [schema, *schema.get("anyOf", ())]
    allowed = [{*_PLAIN, "anyOf"}, *[set(_PLAIN) - {"enum", "const", "$ref"}] * (len(members) - 1)]
    bad = [keyword for one, known in zip(members, allowed) for keyword in one if keyword not in known]
    bad += [str(one["type"]) for one in members if one.get("type") in ("object", "array")]
    if bad:
        raise ToolkitError(
            f"tools must not have {shown(bad[0])} in a string's schema where calls are enforced and the model writes "
            f"strings as bare text, got it in {shown(where)}."
        )


def _inside_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
