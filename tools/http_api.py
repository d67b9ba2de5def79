"""``python -m tools.http_api`` writes ``docs/http-api.md``: every endpoint, and every field of every body.

The page is made of the OpenAPI documents of a server that generates and of one that pools.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.serving.body import NOT_OFFERED

PAGE = Path(__file__).parent.parent / "docs" / "http-api.md"
COMMAND = "python -m tools.http_api"
_HEAD = f"""# HTTP endpoints and fields

Made of the server's OpenAPI documents by `{COMMAND}`. A server shows its own under `/openapi.json` and `/docs`,
with the names and the limits of its model. Fields that are not listed are errors; a null is the same as a field that is
not given.
"""
_IGNORED, _INERT = "Accepted with any value", "Not offered"


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    """(heading, OpenAPI document) of each kind of server."""
    from toolkit.engine import AsyncEngine, Engine
    from toolkit.engine.pooling import PoolingEngine, PoolingQueue
    from toolkit.serving.app import ServerConfig, create_app
    from toolkit.testing.models import random_model

    with Engine(random_model("llama"), num_blocks=4) as engine:
        yield "A model that generates", create_app(ServerConfig("MODEL", AsyncEngine(engine))).openapi()
    queue = PoolingQueue(PoolingEngine(random_model("llama")))
    yield "A pooling model", create_app(ServerConfig("MODEL", queue)).openapi()


def page() -> str:
    """The text of the page."""
    parts = [_HEAD]
    seen: set[str] = set()
    schemas: dict[str, Any] = {}
    used: list[str] = []
    for heading, document in documents():
        known = document["components"]["schemas"]
        schemas |= {name: schema for name, schema in known.items() if name not in schemas}
        endpoints = [
            text
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
            for text in _endpoint(f"{method.upper()} {path}", operation, known, seen, used)
        ]
        parts += [f"\n## {heading}\n", *endpoints]
    parts.append("\n## Objects\n")
    done: set[str] = set()
    while used:
        name = used.pop(0)
        if name not in done:
            done.add(name)
            parts += [f"\n### {name}\n", *_fields(schemas[name], used)]
    return "\n".join(parts).rstrip() + "\n"


def _endpoint(title: str, operation: dict[str, Any], schemas: Any, seen: set[str], used: list[str]) -> Iterator[str]:
    if title in seen:
        return
    seen.add(title)
    yield f"\n### `{title}`\n"
    parameters = [one for one in operation.get("parameters", ()) if one["in"] == "query"]
    if parameters:
        properties = {one["name"]: {**one["schema"], "description": one.get("description", "")} for one in parameters}
        yield from _fields({"properties": properties}, used)
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body is not None:
        yield from _fields(schemas[_name(body)], used)
    good = operation["responses"].get("200", {}).get("content", {})
    found = [
        _kind(one["schema"], used) for kind, one in good.items() if kind == "application/json" and one.get("schema")
    ]
    found += ["a stream of events" for kind in good if kind == "text/event-stream"]
    found += ["text" for kind in good if kind == "text/plain"]
    if found:
        yield f"Returns {' or '.join(found)}.\n"


def _fields(schema: dict[str, Any], used: list[str]) -> Iterator[str]:
    """A table of the fields, and the names of those that are ignored or not offered."""
    properties, required = schema.get("properties", {}), schema.get("required", ())
    ignored = [name for name, one in properties.items() if one.get("description", "").startswith(_IGNORED)]
    inert = [name for name in NOT_OFFERED if properties.get(name, {}).get("description", "").startswith(_INERT)]
    rows = [(name, one) for name, one in properties.items() if name not in (*ignored, *inert)]
    if not properties:
        yield f"{_kind(schema, used)}\n"
    if rows:
        yield "| field | type | default | |\n|---|---|---|---|"
        for name, one in rows:
            default = (
                "required" if name in required else "" if one.get("default") is None else f"`{_json(one['default'])}`"
            )
            text = re.sub(r"\bNone\b", "null", one.get("description", "").replace("``", "`").replace("|", "\\|"))
            yield f"| `{name}` | {_kind(one, used)} | {default} | {text} |"
        yield ""
    if ignored:
        yield f"Accepted and not used: {_listed(ignored)}.\n"
    if inert:
        yield f"An error unless they ask for nothing: {_listed(inert)}.\n"


def _kind(schema: dict[str, Any], used: list[str]) -> str:
    if "$ref" in schema:
        name = _name(schema)
        used.append(name)
        return f"[{name}](#{name.lower()})"
    for union in ("anyOf", "oneOf"):
        if union in schema:
            kinds = [_kind(one, used) for one in schema[union] if one.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds)) or "null"
    if "enum" in schema:
        return ", ".join(f"`{_json(one)}`" for one in schema["enum"])
    if "const" in schema:
        return f"`{_json(schema['const'])}`"
    kind = schema.get("type", "any")
    if kind == "array":
        inner = _kind(schema.get("items", {}), used)
        return f"list of {inner}{_bounds(schema, 'minItems', 'maxItems')}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_kind(schema['additionalProperties'], used)}"
    if kind == "string":
        return f"text{_bounds(schema, 'minLength', 'maxLength')}"
    names = {"integer": "integer", "number": "number", "boolean": "true or false"}
    return names.get(kind, kind) + _bounds(schema, "minimum", "maximum", "exclusiveMinimum")


def _bounds(schema: dict[str, Any], low: str, high: str, above: str = "") -> str:
    signs = ((low, "≥"), (above, ">"), (high, "≤"))
    found = [f"{sign} {schema[name]:,}" for name, sign in signs if name in schema]
    return f" ({', '.join(found)})" if found else ""


def _name(schema: dict[str, Any]) -> str:
    return str(schema["$ref"].rsplit("/", 1)[1])


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _json(value: Any) -> str:
    from toolkit.strict_json import strict_json

    return strict_json(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
