"""JSON schemas after the keywords of the public JSON Schema test suite, and a validator of what is written by them."""

import datetime
import ipaddress
import json
import re
import uuid
from collections.abc import Iterator
from decimal import Decimal, localcontext
from itertools import pairwise
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker, ValidationError, validators

Schema = dict[str, Any]

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
STRING, INTEGER, NUMBER, BOOLEAN, NULL = ({"type": kind} for kind in ("string", "integer", "number", "boolean", "null"))


def array(items: Any = None, **more: Any) -> Schema:
    return {"type": "array", **({} if items is None else {"items": items}), **more}


def obj(properties: Schema, required: list[str] | None = None, **more: Any) -> Schema:
    """An object of these properties, all of them required unless ``required`` says which, and of no others."""
    wanted = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": wanted, "additionalProperties": False, **more}


def _types() -> list[Schema]:
    single = [{"type": kind} for kind in TYPES]
    pairs = [{"type": [one, other]} for one, other in pairwise(TYPES)]
    return [*single, *pairs, {"type": ["string", "integer", "null"]}, {"type": list(TYPES)}, {}]


def _enums() -> list[Schema]:
    values: list[list[Any]] = [
        ["red"], ["red", "green", "blue"], [1, 2, 3], [0.5, 1.5], [True], [False, None], ["a", 1, None], [[1, 2], [3]],
        [{"a": 1}, {"b": [2]}], ["ü", "日本", "🎉"], ['with "quotes"', "back\\slash", "new\nline"], ["", " "],
    ]  # fmt: skip
    constants: list[Any] = ["x", 0, -1.25, None, True, [], {}, [1, "a", None], {"k": {"n": [1]}}, "é\t/"]
    return [{"enum": one} for one in values] + [{"const": one} for one in constants] + [
        {"type": "string", "enum": ["a", "b"]}, {"type": "integer", "enum": [1, 2.5, 3]}, {"type": "integer",
        "const": 7},
    ]  # fmt: skip


def _objects() -> list[Schema]:
    return [
        obj({"a": INTEGER}),
        obj({"a": INTEGER, "b": STRING}),
        obj({"a": INTEGER, "b": STRING}, []),
        obj({"a": INTEGER, "b": STRING, "c": NULL}, ["b"]),
        obj({"a": INTEGER, "b": STRING, "c": NULL}, ["c", "a"]),
        obj({}),
        obj({"a": BOOLEAN}, additionalProperties=True),
        obj({"a": BOOLEAN}, additionalProperties={"type": "integer"}),
        obj({"a": BOOLEAN}, [], additionalProperties={"type": "null"}),
        {"type": "object", "required": ["z"]},
        {"type": "object", "properties": {"a": True}, "required": ["a"], "additionalProperties": False},
        {"type": "object", "properties": {"a": False, "b": NULL}, "additionalProperties": False},
        {"type": "object", "additionalProperties": {"type": "boolean"}},
        {"type": "object", "additionalProperties": {"type": "array", "items": NULL}},
        {"type": "object", "patternProperties": {"^x_": INTEGER}, "additionalProperties": False},
        {"type": "object", "patternProperties": {"^x_": INTEGER, "^y_": STRING}, "additionalProperties": False},
        {"type": "object", "properties": {"id": INTEGER}, "patternProperties": {"^s_[a-z]$": STRING},
         "required": ["id"], "additionalProperties": False},
        obj({'quote"d': INTEGER, "ü": NULL, "a/b~c": BOOLEAN}),
        {"properties": {"a": INTEGER}, "type": "object"},
        {"required": ["a", "b"], "type": "object", "properties": {"b": STRING}},
        obj({f"key{at}": INTEGER for at in range(8)}),
        obj({f"key{at}": BOOLEAN for at in range(5)}, ["key4"]),
    ]  # fmt: skip


def _arrays() -> list[Schema]:
    bounds: list[Schema] = [
        {"minItems": 1}, {"maxItems": 2}, {"minItems": 2, "maxItems": 2}, {"minItems": 0, "maxItems": 0},
        {"minItems": 3, "maxItems": 5},
    ]  # fmt: skip
    return [
        array(INTEGER), array(STRING), array(array(NULL)), array({"enum": ["a", "b"]}), array(False), array(True),
        *(array(INTEGER, **one) for one in bounds),
        *(array(**one) for one in bounds[:3]),
        array(False, prefixItems=[INTEGER, STRING]),
        array(False, prefixItems=[INTEGER, STRING], minItems=2),
        array(NULL, prefixItems=[BOOLEAN]),
        array(NULL, prefixItems=[BOOLEAN, INTEGER], minItems=2, maxItems=4),
        {"type": "array", "prefixItems": [STRING, {"const": 1}], "minItems": 2},
        array(obj({"a": INTEGER}), minItems=1, maxItems=2),
        array({"anyOf": [INTEGER, NULL]}, maxItems=3),
    ]  # fmt: skip


def _strings() -> list[Schema]:
    lengths: list[Schema] = [
        {"minLength": 1}, {"maxLength": 3}, {"minLength": 2, "maxLength": 4}, {"maxLength": 0},
        {"minLength": 5, "maxLength": 5},
    ]  # fmt: skip
    patterns = [
        "^a+$", "^[A-Z][a-z]{2,5}$", "b", "^x", "y$", "^\\d{3}-\\d{4}$", "^(red|green)$", "^[^a]$", "^.$",
        "^\\w+@\\w+$",
        "^é{2}$", "[\"\\\\/]", "^(?:ab?){1,3}$", "^\\s*$", "^$", "^[0-9a-f]{8}$",
    ]  # fmt: skip
    return [
        *({"type": "string", **one} for one in lengths),
        *({"type": "string", "pattern": one} for one in patterns),
        {"type": "string", "pattern": "^[ab]*$", "minLength": 2, "maxLength": 5},
        {"type": "string", "pattern": "a", "maxLength": 4},
    ]


FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")


def _formats() -> list[Schema]:
    return [{"type": "string", "format": one} for one in FORMATS] + [
        obj({"at": {"type": "string", "format": "date"}, "who": {"type": "string", "format": "email"}}),
        array({"type": "string", "format": "ipv4"}, maxItems=2),
    ]


def _numbers() -> list[Schema]:
    return [
        {"type": "integer", "minimum": 3}, {"type": "integer", "maximum": -3}, {"type": "integer",
        "minimum": 0, "maximum": 9},
        {"type": "integer", "minimum": -12, "maximum": 345}, {"type": "integer", "exclusiveMinimum": 0},
        {"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 4}, {"type": "integer",
        "minimum": 17, "maximum": 17},
        {"type": "number", "minimum": 0, "maximum": 1}, {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2.25}, {"type": "number", "exclusiveMaximum": 0},
        {"type": "number", "minimum": 99.5, "maximum": 100.25}, {"type": "integer", "minimum": 1.5, "maximum": 3.5},
        {"type": "integer", "multipleOf": 3}, {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 50},
        {"type": "number", "multipleOf": 0.5}, {"type": "number", "multipleOf": 0.01},
        {"type": "number", "multipleOf": 2, "minimum": 1}, {"type": "integer", "multipleOf": 10, "maximum": 0},
        {"minimum": 5}, {"maxLength": 2}, {"type": ["integer", "string"], "minimum": 2, "maxLength": 2},
    ]  # fmt: skip


def _combined() -> list[Schema]:
    return [
        {"anyOf": [INTEGER, STRING]}, {"anyOf": [{"const": 1}, {"const": "a"}, NULL]},
        {"anyOf": [obj({"a": INTEGER}), obj({"b": STRING})]}, {"anyOf": [array(INTEGER), INTEGER]},
        {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "string", "pattern": "^long"}]},
        {"type": "integer", "anyOf": [{"maximum": 3}, {"minimum": 8}]},
        {"anyOf": [{"enum": [1, 2]}, {"enum": [2, 3]}]},
        {"oneOf": [INTEGER, STRING]}, {"oneOf": [NULL, BOOLEAN, array(NULL)]}, {"oneOf": [{"const": "a"},
        {"const": "b"}]},
        {"oneOf": [obj({"kind": {"const": "a"}, "x": INTEGER}), obj({"kind": {"const": "b"}, "y": STRING})]},
        {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "integer"}, {"type": "null"}]},
        {"allOf": [INTEGER, {"minimum": 3}]}, {"allOf": [{"minimum": 3}, {"maximum": 6}, INTEGER]},
        {"allOf": [{"type": "string", "pattern": "^a"}, {"maxLength": 3}]},
        {"allOf": [{"type": "string", "pattern": "a"}, {"type": "string", "pattern": "b"}], "maxLength": 5},
        {"allOf": [{"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
                   {"type": "object", "properties": {"b": STRING}, "required": ["b"]}]},
        {"allOf": [{"type": ["integer", "string"]}, {"type": ["string", "null"]}]},
        {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]}, {"allOf": []}, {"allOf": [{}]},
        {"allOf": [{"anyOf": [INTEGER, STRING]}, {"anyOf": [STRING, NULL]}]},
        {"allOf": [{"type": "integer", "multipleOf": 2}, {"multipleOf": 3}]},
        {"type": "object", "properties": {"a": INTEGER}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"type": "object", "properties": {"a": {"anyOf": [INTEGER, NULL]}},
        "required": ["a"], "additionalProperties": False},
        {"allOf": [array(INTEGER, minItems=1), array(maxItems=2)]},
    ]  # fmt: skip


def _references() -> list[Schema]:
    tree = obj({"value": INTEGER, "children": array({"$ref": "#"}, maxItems=1)})
    return [
        {"$ref": "#/$defs/a", "$defs": {"a": INTEGER}},
        obj({"x": {"$ref": "#/$defs/a"}, "y": {"$ref": "#/$defs/a"}}, **{"$defs": {"a": {"enum": ["p", "q"]}}}),
        {"$ref": "#/definitions/a", "definitions": {"a": {"$ref": "#/definitions/b"}, "b": STRING}},
        tree,
        {"$ref": "#/$defs/list",
        "$defs": {"list": {"anyOf": [NULL, obj({"head": INTEGER, "tail": {"$ref": "#/$defs/list"}})]}}},
        obj({"a": INTEGER, "b": {"$ref": "#/properties/a"}}),
        {"$ref": "#/$defs/tilde~0field", "$defs": {"tilde~field": INTEGER}},
        {"$ref": "#/$defs/slash~1field", "$defs": {"slash/field": NULL}},
        {"$ref": "#/$defs/percent%25field", "$defs": {"percent%field": BOOLEAN}},
        {"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": INTEGER}},
        {"$id": "https://example.org/root.json", "$ref": "#/$defs/a", "$defs": {"a": array(NULL)}},
        {"$defs": {"even": {"$id": "https://example.org/even", "type": "integer", "multipleOf": 2}},
         "$ref": "https://example.org/even"},
        array({"$ref": "#/$defs/pair"},
        maxItems=2, **{"$defs": {"pair": array(False, prefixItems=[INTEGER, STRING], minItems=2)}}),
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$ref": "#/$defs/a", "$defs": {"a": {"const": 1}}},
    ]  # fmt: skip


def _counts() -> list[Schema]:
    three = dict.fromkeys("abc", INTEGER)
    return [
        {"type": "object", "minProperties": 1}, {"type": "object", "minProperties": 0},
        {"type": "object", "additionalProperties": INTEGER, "minProperties": 1},
        {"type": "object", "required": ["a"], "minProperties": 2}, {"type": "object", "maxProperties": 0},
        obj(three, ["a"], minProperties=1), obj(three, minProperties=2), obj(three, maxProperties=3),
        obj(three, minProperties=3, maxProperties=3), obj({}, minProperties=0, maxProperties=2),
    ]  # fmt: skip


def _nested() -> list[Schema]:
    person = obj(
        {
            "name": {"type": "string", "minLength": 1, "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
        }
    )
    return [
        person, obj({"people": array(person, minItems=1, maxItems=2), "total": INTEGER}),
        obj({"a": obj({"b": obj({"c": obj({"d": NULL})})})}), array(array(array(INTEGER, maxItems=2), maxItems=2),
        maxItems=2),
        obj({"tool": {"enum": ["search", "read"]}, "arguments": {"anyOf": [obj({"query": STRING}),
        obj({"path": STRING})]}}),
        obj({"points": array(array(False, prefixItems=[NUMBER, NUMBER], minItems=2), minItems=1, maxItems=3)}),
        obj({"status": {"const": "ok"}, "data": {"type": ["object", "null"]}}),
        obj({"steps": array(obj({"explanation": {"type": "string", "maxLength": 6}, "output": STRING}), maxItems=2),
        "answer": STRING}),
        {"title": "A title", "description": "words", "default": {}, "examples": [{}], "$comment": "none",
        "deprecated": True,
         "readOnly": False, "x-other": 1, **obj({"a": INTEGER})},
    ]  # fmt: skip


ENFORCED: list[Schema] = [
    *_types(), *_enums(), *_objects(), *_arrays(), *_strings(), *_formats(), *_numbers(), *_combined(), *_references(),
    *_counts(), *_nested(),
]  # fmt: skip
REFUSED: list[tuple[Schema, str]] = [
    (array(INTEGER, uniqueItems=True), "uniqueItems"), ({"not": STRING}, "not"), (array(contains=INTEGER), "contains"),
    (array(minContains=1), "minContains"), (array(maxContains=1), "maxContains"),
    ({"if": STRING, "then": {"maxLength": 3}}, "if"), ({"type": "object", "propertyNames": {"maxLength": 3}},
    "propertyNames"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"type": "object", "dependentSchemas": {"a": {}}}, "dependentSchemas"),
    ({"type": "object", "dependencies": {"a": ["b"]}}, "dependencies"),
    ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
    (array(unevaluatedItems=False), "unevaluatedItems"), ({"$dynamicRef": "#a"}, "$dynamicRef"),
    ({"$recursiveRef": "#"}, "$recursiveRef"), ({"type": "string", "format": "iri"}, "iri"),
    ({"$ref": "https://example.org/elsewhere"}, "https://example.org/elsewhere"), ({"$ref": "#/$defs/none"},
    "/$defs/none"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"), ({"type": "string", "pattern": "(a)\\1"},
    "backreferences"),
    ({"type": "string", "pattern": "[a&&b]"}, "'&&'"), ({"type": "string", "pattern": "[a[b]]"}, "'['"),
    ({"type": "string", "pattern": "[\\x00-z]"}, "U+0000"), ({"type": "string", "pattern": "\\p{Cc}"}, "\\p{Cc}"),
    ({"type": "string", "pattern": "(?x)a"}, "the flag x"), ({"type": "string", "pattern": "[]a]"}, "']'"),
    ({"const": "bell \a"}, "control characters"), ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "'exclusiveMinimum' 0"),
    ({"allOf": [{"type": "number", "exclusiveMaximum": -1}, {"minimum": -1.5}]}, "'exclusiveMaximum' -1"),
    ({"$ref": "#/$defs/a", "maximum": 2.5, "$defs": {"a": {"exclusiveMinimum": 2}}}, "'exclusiveMinimum' 2"),
    ({"oneOf": [INTEGER, {"type": "integer", "minimum": 2}]}, "oneOf"), ({"oneOf": [STRING, {"maxLength": 3}]},
    "oneOf"),
    ({"type": "object", "minProperties": 2}, "minProperties"), ({"type": "object", "properties": {"a": NULL},
    "maxProperties": 2}, "maxProperties"),
    ({"type": "object", "patternProperties": {"^a": NULL, "b$": INTEGER}}, "disjoint"), ({"type": "text"}, "text"),
    ({"enum": []}, "anyOf"), (obj({"a": INTEGER}, ["b"]), "'b'"),
    (obj({"a": {"not": {}, "x-guidance": {"lenient": True}}}), "not"), ({"not": {}, "x-guidance": {"lenient": True}},
    "not"),
    ({"oneOf": [INTEGER, NUMBER], "x-guidance": {"coerce_one_of": True}}, "oneOf"),
]  # fmt: skip
"""Schemas that are refused, and what the sentence names."""


def violation(schema: Schema, text: str) -> str | None:
    """What is wrong with a JSON text by ``jsonschema``, its formats included; None if nothing is.

    Decimal fractions are compared as such: 0.07 is a multiple of 0.01, and its float64 is not.
    """
    try:
        value = json.loads(text, parse_float=_decimal)
    except ValueError as error:
        return f"no JSON: {error}"
    exact = json.loads(json.dumps(schema), parse_float=_decimal)
    return next((error.message for error in _Validator(exact, format_checker=_CHECKER).iter_errors(value)), None)


def _decimal(digits: str) -> Decimal | float:
    value = float(digits)
    return Decimal(digits) if 1e-300 < abs(value) < 1e300 else Decimal(0) if value == 0 else value


def _ecma_pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not (re.search(pattern, instance, re.ASCII) or re.search(pattern, instance)):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _exact_multiple(validator: Any, factor: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, int | float | Decimal) and not isinstance(instance, bool):
        with localcontext(prec=1000, traps=[]):
            if Decimal(instance) % Decimal(factor) != 0:  # NaN for what has too many digits
                yield ValidationError(f"{instance} is not a multiple of {factor}")


_CHECKER = FormatChecker(formats=())
_Validator = validators.extend(Draft202012Validator, {"pattern": _ecma_pattern, "multipleOf": _exact_multiple})
"""Its patterns are read as ECMA-262 does, whose \\d and \\w know ASCII alone and whose \\s knows all of Unicode's."""
_DATE = r"\d{4}-\d\d-\d\d"
_TIME = r"(\d\d):(\d\d):(\d\d)(\.\d+)?(Z|z|[+-](\d\d):(\d\d))"


@_CHECKER.checks("date", raises=ValueError)
def _is_date(value: Any) -> bool:
    return not isinstance(value, str) or (
        re.fullmatch(_DATE, value, re.A) is not None and bool(datetime.date.fromisoformat(value))
    )


@_CHECKER.checks("time")
def _is_time(value: Any) -> bool:
    found = re.fullmatch(_TIME, value, re.A) if isinstance(value, str) else None
    if found is None:
        return not isinstance(value, str)
    hour, minute, second = map(int, found.groups()[:3])
    zone = [int(found[6] or 0), int(found[7] or 0)]
    sign = 1 if "+" in found[5] else -1
    leap = (60 * hour + minute - sign * (60 * zone[0] + zone[1])) % 1440 == 1439  # 23:59:60 in UTC
    return hour < 24 and minute < 60 and (second < 60 or (second == 60 and leap)) and zone[0] < 24 and zone[1] < 60


@_CHECKER.checks("date-time", raises=ValueError)
def _is_date_time(value: Any) -> bool:
    return not isinstance(value, str) or (value[10:11] in ("T", "t") and _is_date(value[:10]) and _is_time(value[11:]))


@_CHECKER.checks("duration")
def _is_duration(value: Any) -> bool:
    days, hours = r"(\d+D|\d+M(\d+D)?|\d+Y(\d+M(\d+D)?)?)", r"T(\d+S|\d+M(\d+S)?|\d+H(\d+M(\d+S)?)?)"
    return not isinstance(value, str) or re.fullmatch(rf"P({days}({hours})?|{hours}|\d+W)", value, re.A) is not None


@_CHECKER.checks("email")
def _is_email(value: Any) -> bool:
    atom = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
    label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    domain = rf"({label}(\.{label})*|\[[^\[\]\\\s]+\])"
    local = rf"({atom}(\.{atom})*|\"([^\"\\\x00-\x1f\x7f]|\\[\x20-\x7e])*\")"
    return not isinstance(value, str) or re.fullmatch(rf"{local}@{domain}", value) is not None


@_CHECKER.checks("hostname")
def _is_hostname(value: Any) -> bool:
    label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    return not isinstance(value, str) or (
        len(value) <= 253 and re.fullmatch(rf"{label}(\.{label})*", value) is not None
    )


@_CHECKER.checks("ipv4", raises=ValueError)
def _is_ipv4(value: Any) -> bool:
    return not isinstance(value, str) or bool(ipaddress.IPv4Address(value))


@_CHECKER.checks("ipv6", raises=ValueError)
def _is_ipv6(value: Any) -> bool:
    return not isinstance(value, str) or ("%" not in value and ipaddress.IPv6Address(value) is not None)


@_CHECKER.checks("uuid", raises=ValueError)
def _is_uuid(value: Any) -> bool:
    return not isinstance(value, str) or (
        re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", value) is not None
        and uuid.UUID(value) is not None
    )


@_CHECKER.checks("uri")
def _is_uri(value: Any) -> bool:
    return (
        not isinstance(value, str)
        or re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:([A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*", value)
        is not None
    )
