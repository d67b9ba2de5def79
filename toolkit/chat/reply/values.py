"""Values that a call writes as bare text, as the tool's JSON schema types them."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

_PYTHON = {"True": True, "False": False, "None": None}
_KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "boolean": (bool,), "null": (type(None),), "integer": (int,),
    "number": (int, float),
}  # fmt: skip


def property_schemas(parameters: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The schemas of an object's properties, references resolved."""
    properties = resolved(parameters, parameters).get("properties")
    return {
        name: resolved(schema, parameters)
        for name, schema in (properties.items() if isinstance(properties, Mapping) else ())
        if isinstance(schema, Mapping)
    }


def types_of(schema: Mapping[str, Any], root: Mapping[str, Any], depth: int = 8) -> frozenset[str]:
    """The types that a schema allows; empty where it does not say."""
    return frozenset(_types(schema, root, depth))


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> Iterator[str]:
    if not isinstance(schema, Mapping) or depth == 0:
        return
    schema = resolved(schema, root)
    declared = schema.get("type")
    yield from [declared] if isinstance(declared, str) else map(str, declared or ())
    for keyword in ("anyOf", "oneOf", "allOf"):
        for one in schema.get(keyword) or ():
            yield from _types(one, root, depth - 1)
    if not declared:
        for value in schema.get("enum", [schema["const"]] if "const" in schema else ()):
            yield "string" if isinstance(value, str) else _kind(value)
    if schema.get("nullable"):
        yield "null"


def _kind(value: Any) -> str:
    return next((name for name, kinds in _KINDS.items() if type(value) in kinds), "number")


def resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema behind references within ``root``."""
    for _ in range(16):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#"):
            break
        target: Any = root
        for part in reference.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            target = target.get(name) if isinstance(target, Mapping) else None
        schema = target
    return schema if isinstance(schema, Mapping) else {}


def json_of(text: str, types: frozenset[str]) -> str:
    """JSON text of a value that is written as bare text: a string, unless it reads as another type of ``types``."""
    bare = text.strip()
    if types - {"string"}:
        try:
            value = _PYTHON[bare] if bare in _PYTHON else json.loads(bare, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return json.dumps(text, ensure_ascii=False)
        if isinstance(value, float) and value.is_integer() and "integer" in types and "number" not in types:
            return str(int(value))
        if any(type(value) in _KINDS.get(name, ()) for name in types):
            return json.dumps(value) if bare in _PYTHON else bare
    return json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> Any:
    raise ValueError(constant)
