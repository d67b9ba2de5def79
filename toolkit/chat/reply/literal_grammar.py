"""Grammars of arguments that are literals of another language than JSON, from a tool's JSON schema."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.chat.reply.calls import GrammarTerms
from toolkit.chat.reply.values import resolved, types_of
from toolkit.chat.tools import Tool
from toolkit.errors import ToolkitError
from toolkit.sentences import shown

_ABOUT = {"title", "description", "default", "examples", "$defs", "definitions", "nullable", "additionalProperties"}
_TAKEN = {
    "string": {"type", "enum", "const"}, "integer": {"type", "enum", "const"}, "number": {"type", "enum", "const"},
    "boolean": {"type"}, "null": {"type"}, "array": {"type", "items"}, "object": {"type", "properties", "required"},
}  # fmt: skip
_NUMBERS = {
    "integer": "/-?(0|[1-9][0-9]{0,30})/",
    "number": r"/-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?(e-?[0-9]{1,2})?/",
}


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a language writes values.

    Args:
        true, false, null: their names.
        quote: around strings.
        escapes: whether a backslash escapes inside them.
        pair: before the value of an argument.
        key_quote: around keys of inner objects.
        gap: behind commas, and behind colons of inner objects.
    """

    true: str
    false: str
    null: str
    quote: str
    escapes: bool
    pair: str
    key_quote: str = ""
    gap: str = ""


def literal_grammar(dialect: Dialect, tool: Tool, terms: GrammarTerms) -> str:
    """A term of the arguments of a tool, without what stands around them; any where its schema names none.

    Raises:
        ToolkitError: for other schemas.
    """
    literals = _Literals(dialect, tool, terms)
    if "properties" in tool.parameters:
        return literals.members(tool.parameters, dialect.pair, tool.name)
    return literals.any_members()


class _Literals:
    def __init__(self, dialect: Dialect, tool: Tool, terms: GrammarTerms) -> None:
        self._dialect, self._root, self._terms = dialect, tool.parameters, terms

    def members(self, schema: Mapping[str, Any], pair: str, where: str) -> str:
        """Pairs of an object, in the order of its schema."""
        required = schema.get("required", ())
        text = self._terms.text
        comma = text("," + self._dialect.gap)
        pairs = {
            name: f"{text(pair.format(key=name))} {self._value(one, f'{where}.{name}')}"
            for name, one in schema.get("properties", {}).items()
        }
        # Behind the last of the required ones each other may follow; before, a comma follows each.
        needed = [one for name, one in pairs.items() if name in required]
        others = [one for name, one in pairs.items() if name not in required]
        if not needed and others:
            rows = [
                " ".join([one, *(f"({comma} {later})?" for later in others[at + 1 :])]) for at, one in enumerate(others)
            ]
            return f"({' | '.join(rows)})?"
        return " ".join([f" {comma} ".join(needed), *(f"({comma} {one})?" for one in others)])

    def any_members(self) -> str:
        """Pairs of any names and values."""
        text, comma = self._terms.text, self._terms.text("," + self._dialect.gap)
        before, behind = self._dialect.pair.split("{key}")
        pair = " ".join(
            part for part in (before and text(before), r"/[A-Za-z_]\w*/", text(behind), self._anything()) if part
        )
        return f"({pair} ({comma} {pair})*)?"

    def _value(self, schema: Any, where: str, depth: int = 0) -> str:
        schema = resolved(schema, self._root)
        if depth > 16:
            raise _refused("references that go around", where)
        unions = schema.get("anyOf") or schema.get("oneOf")
        if unions:
            return f"({' | '.join(self._value(one, where, depth + 1) for one in unions)})"
        types = sorted(types_of(schema, self._root))
        if not types and not set(schema) - _ABOUT:
            return self._anything()
        if not types:
            raise _refused(shown(next(iter(set(schema) - _ABOUT))), where)
        return f"({' | '.join(self._of_type(one, schema, where, depth) for one in types)})"

    def _of_type(self, kind: str, schema: Mapping[str, Any], where: str, depth: int) -> str:
        text, dialect = self._terms.text, self._dialect
        bad = next((name for name in schema if name not in _ABOUT | _TAKEN[kind]), None)
        if bad is not None:
            raise _refused(shown(bad), where)
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if values is not None:
            return f"({' | '.join(text(self._written(value)) for value in values)})"
        if kind == "string":
            return self._string()
        if kind == "boolean":
            return f"({text(dialect.true)} | {text(dialect.false)})"
        if kind == "null":
            return text(dialect.null)
        if kind in ("integer", "number"):
            return _NUMBERS[kind]
        if kind == "array":
            one = self._terms.rule("item", self._value(schema.get("items", {}), f"{where}[]", depth + 1))
            return self._list(one)
        if "properties" not in schema:
            return self._pairs(self._anything())
        key = f"{dialect.key_quote}{{key}}{dialect.key_quote}:{dialect.gap}"
        return f"{text('{')} {self.members(schema, key, where)} {text('}')}"

    def _string(self) -> str:
        if self._dialect.escapes:
            return self._terms.json({"type": "string"})
        return f"{self._terms.text(self._dialect.quote)} {self._terms.until(self._dialect.quote)}"

    def _list(self, one: str) -> str:
        text, comma = self._terms.text, self._terms.text("," + self._dialect.gap)
        return f"{text('[')} ({one} ({comma} {one})*)? {text(']')}"

    def _pairs(self, value: str) -> str:
        """An object of any keys."""
        text, comma = self._terms.text, self._terms.text("," + self._dialect.gap)
        key = self._string() if self._dialect.key_quote else r"/\w+/"
        pair = f"{key} {text(':' + self._dialect.gap)} {value}"
        return f"{text('{')} ({pair} ({comma} {pair})*)? {text('}')}"

    def _anything(self) -> str:
        text, dialect = self._terms.text, self._dialect
        names = map(text, (dialect.true, dialect.false, dialect.null))
        kinds = (self._string(), _NUMBERS["number"], *names, self._list("anything"))
        return self._terms.named("anything", " | ".join((*kinds, self._pairs("anything"))))

    def _written(self, value: Any) -> str:
        dialect = self._dialect
        if isinstance(value, str):
            return json.dumps(value) if dialect.escapes else f"{dialect.quote}{value}{dialect.quote}"
        return (
            {True: dialect.true, False: dialect.false, None: dialect.null}.get(value, json.dumps(value))
            if (value is None or isinstance(value, bool))
            else json.dumps(value)
        )


def _refused(what: str, where: str) -> ToolkitError:
    return ToolkitError(
        f"tools must not have {what} in a schema where calls are enforced in the syntax of this model, "
        f"got it in {shown(where)}."
    )
