"""JSON schemas, written so that llguidance enforces what ``jsonschema`` checks, or refused by the keyword.

llguidance refuses the keywords that it does not know. What is here are those that it takes and does not always enforce,
as runs of random texts through its grammars showed.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from toolkit.engine.grammar.patterns import enforceable
from toolkit.errors import ToolkitError

Schema = dict[str, Any]

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_VALUES = ("const", "enum", "default", "examples", "required", "x-guidance")
"""Keywords whose values hold no schemas."""

_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = [
    f"^(?:[0-9]{{4}}-(?:0[13-9]|1[0-2])|[0-9]{{4}}-02-(?:[01][0-9]|2[0-8])|{_LEAP}-02-29)",
    "^(?:[0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})-",
]
"""29 February in leap years alone, and no year 0."""
_TIME = "[0-9]{2}:[0-9]{2}:[0-5]"
"""No leap second: whether there was one depends on the date and the time zone."""
_FORMATS = {"date": _DATE, "time": [f"^{_TIME}"], "date-time": [*_DATE, f"^.{{11}}{_TIME}"]}

MAX_OPTIONAL = 498
"""Of one object; the time to compile them grows with the square of their number, too."""

_CONTROL = re.compile(r"\\u00[01]")
"""A control character as ``json.dumps`` writes it, without those that have a letter: \\b, \\t, \\n, \\f and \\r."""
ESCAPES = 'nrbtf\\"'
"""Letters after a backslash in outputs. With ``u`` a property's name could be written in a second way, which
additional properties would not exclude."""


def enforced(schema: Schema) -> Schema:
    """A schema for llguidance that allows what ``schema`` allows, less what it could not tell from what is not allowed.

    Raises:
        ToolkitError: a keyword that would not be enforced, by its name.
    """
    text = json.dumps(schema)
    if _CONTROL.search(text):
        raise _refused("control characters in strings, but for \\b, \\t, \\n, \\f and \\r")
    made: Schema = _Rewriting(schema, '"exclusiveM' in text).schema(schema)
    return made


class _Rewriting:
    """Goes through one schema.

    Args:
        root: what its references point into.
        exclusive: whether there are exclusive bounds anywhere.
    """

    def __init__(self, root: Schema, exclusive: bool) -> None:
        self._root, self._exclusive = root, exclusive

    def schema(self, given: Any) -> Any:
        if isinstance(given, list):  # items, as they were before 2020
            return [self.schema(one) for one in given]
        if not isinstance(given, dict):
            return given
        self._check_counts(given)
        self._check_width(given)
        self._check_bounds(given)
        made: Schema = {}
        for keyword, value in given.items():
            if keyword == "pattern" and isinstance(value, str):
                made[keyword] = enforceable(value)
            elif keyword in _MAPS and isinstance(value, dict):
                names = enforceable if keyword == "patternProperties" else str
                made[keyword] = {names(name): self.schema(one) for name, one in value.items()}
            elif keyword in _VALUES:
                made[keyword] = value
            else:  # references may point into keywords that nobody knows
                made[keyword] = self.schema(value)
        more = _FORMATS.get(given["format"], []) if isinstance(given.get("format"), str) else []
        if more:
            made["allOf"] = [*made.get("allOf", []), *({"pattern": one} for one in more)]
        return made

    def _check_counts(self, given: Schema) -> None:
        """Names of additional properties may repeat, and count once."""
        least, required = given.get("minProperties"), given.get("required")
        closed = given.get("additionalProperties") is False and not given.get("patternProperties")
        distinct = len(required) + 1 if isinstance(required, list) else 1
        if isinstance(least, int) and least > distinct and not closed:
            raise _refused(f"'minProperties' > {distinct} with properties that 'properties' does not list")

    def _check_width(self, given: Schema) -> None:
        """Any of the optional properties may come next: four items each of llguidance's row, which has 2,000."""
        properties, required = given.get("properties"), given.get("required")
        optional = set(properties if isinstance(properties, dict) else ())
        optional -= {one for one in required if isinstance(one, str)} if isinstance(required, list) else set()
        if len(optional) > MAX_OPTIONAL:
            raise _refused(f"> {MAX_OPTIONAL} 'properties' of an object that 'required' does not list")

    def _check_bounds(self, given: Schema) -> None:
        """A fractional range of less than 1 beside a whole number has that number, exclusive or not."""
        if not self._exclusive or given.get("type") == "integer":
            return
        bounds = list(self._bounds(given, set()))
        for exclusive, sign, others in (
            ("exclusiveMinimum", 1, ("maximum", "exclusiveMaximum")),
            ("exclusiveMaximum", -1, ("minimum", "exclusiveMinimum")),
        ):
            for keyword, bound in bounds:
                near = any(name in others and 0 < sign * (other - bound) < 1 for name, other in bounds)
                if keyword == exclusive and sign * bound >= 0 and bound == math.floor(bound) and near:
                    raise _refused(f"'{exclusive}' {bound} with another bound less than 1 from it")

    def _bounds(self, given: Any, seen: set[int]) -> Iterator[tuple[str, float]]:
        """The numeric bounds of a schema and of those that it is combined with."""
        if not isinstance(given, dict) or id(given) in seen:
            return
        seen.add(id(given))
        for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            value = given.get(keyword)
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield keyword, value
        for keyword in _LISTS[:3]:
            for one in given[keyword] if isinstance(given.get(keyword), list) else ():
                yield from self._bounds(one, seen)
        yield from self._bounds(self._target(given.get("$ref")), seen)

    def _target(self, reference: Any) -> Any:
        """What a reference within the schema points to, or None."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        found: Any = self._root
        for part in reference.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, dict) else None
        return found


def _refused(what: str) -> ToolkitError:
    return ToolkitError(f"structured_outputs must not have {what} in a JSON schema, which cannot be enforced.")
