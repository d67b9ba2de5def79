"""The OpenAPI document: request bodies from ``protocol``, responses from ``schemas``, limits of the served model.

The routes parse bodies themselves, for errors of one sentence, so FastAPI cannot read the bodies off the routes.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from toolkit.serving.body import NOT_OFFERED
from toolkit.serving.errors import Json
from toolkit.serving.field_texts import field_texts
from toolkit.serving.openai import schemas

_COMPONENT = "#/components/schemas/{model}"
_EVENT: Json = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}

LIMITS: dict[str, Json] = {
    "temperature": {"minimum": 0},
    "top_k": {"minimum": -1},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "min_p": {"minimum": 0, "maximum": 1},
    "typical_p": {"exclusiveMinimum": 0, "maximum": 1},
    "xtc_probability": {"minimum": 0, "maximum": 1},
    "xtc_threshold": {"minimum": 0, "maximum": 1},
    "dry_multiplier": {"minimum": 0, "maximum": 100},
    "dry_base": {"minimum": 1, "maximum": 4},
    "dry_allowed_length": {"minimum": 1},
    "max_tokens": {"minimum": 0},
    "max_completion_tokens": {"minimum": 0},
    "min_tokens": {"minimum": 0},
    "seed": {"minimum": -(2**63), "maximum": 2**64 - 1},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "repetition_penalty": {"minimum": 1e-5, "maximum": 1e5},
    "priority": {"minimum": -(2**63), "maximum": 2**63 - 1},
}
"""What ``SamplingParams`` checks; a test holds the two together."""


def responses(
    model: type[BaseModel] | None = None,
    *,
    stream: bool = False,
    lines: bool = False,
    text: bool = False,
    error: type[BaseModel] = schemas.ErrorResponse,
) -> dict[int | str, Json]:
    """``responses=`` of a route: its 200 and the errors, any of which have one body."""
    good: Json = {"description": "OK"}
    if model is not None:
        good["model"] = model
    if stream:
        good["content"] = {"text/event-stream": {"itemSchema": _EVENT}}
    if lines:
        good["content"] = {"application/x-ndjson": {"itemSchema": {"type": "object"}}}
    if text:
        good["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return {200: good, "4XX": {"model": error}, "5XX": {"model": error}}


def takes(body: type[BaseModel], required: bool = True) -> Json:
    """``openapi_extra=`` of a route that parses ``body``."""
    schema = {"$ref": _COMPONENT.format(model=body.__name__)}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def takes_query(query: type[BaseModel]) -> Json:
    """``openapi_extra=`` of a route that parses ``query``."""
    properties = query.model_json_schema()["properties"]
    texts = field_texts(query)
    found = [
        {"name": name, "in": "query", "required": False, "schema": one, "description": texts.get(name, "")}
        for name, one in properties.items()
    ]
    return {"parameters": found}


_TOKENS = ("prompt", "input", "tokens", "token_ids")
"""Fields of bodies that may hold token ids."""


def describe(
    app: FastAPI, names: tuple[str, ...], max_model_len: int | None, vocab_size: int | None,
    bodies: Sequence[type[BaseModel]], adapters: bool = False,
) -> None:  # fmt: skip
    """Let ``app`` serve the document of its routes, made when it is first asked for.

    Args:
        names: of the model.
        max_model_len: bounds ``max_tokens``.
        vocab_size: bounds token ids; None for no bound.
        bodies: of requests, and what they are made of.
        adapters: whether there may be some, which requests name as their model.
    """
    plain = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = plain()
            references, found = models_json_schema([(body, "validation") for body in bodies], ref_template=_COMPONENT)
            for body in bodies:  # two protocols' parts may have one name, and then have longer ones here
                schema = found["$defs"][references[body, "validation"]["$ref"].rpartition("/")[2]]
                _complete(schema, body, names, max_model_len, adapters)
                if vocab_size is not None:
                    for name in _TOKENS:
                        _bound_tokens(schema["properties"].get(name), vocab_size)
            made["components"]["schemas"] |= found["$defs"]
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _complete(
    schema: Json, body: type[BaseModel], names: tuple[str, ...], max_model_len: int | None, any_model: bool
) -> None:
    """What pydantic does not see: null for "not given", fields that are ignored or not offered, limits."""
    properties, required = schema["properties"], schema.get("required", ())
    texts = {(body.model_fields[name].alias or name): text for name, text in field_texts(body).items()}
    for name, one in properties.items():
        kinds = one.pop("anyOf", None) or [{key: one.pop(key) for key in list(one) if key not in ("title", "default")}]
        for kind in kinds:
            if kind.get("type") in ("integer", "number"):
                kind |= LIMITS.get(name, {})
                if max_model_len is not None and name in ("max_tokens", "max_completion_tokens"):
                    kind["maximum"] = max_model_len
        if name == "model":
            kinds = [{"type": "string", "examples": list(names)}] if any_model else [{"enum": list(names)}]
        null = [] if name in required or {"type": "null"} in kinds else [{"type": "null"}]
        one["anyOf"] = [*kinds, *null]
        if (text := texts.get(name)) is not None:
            one.setdefault("description", text)
    for name, inert in getattr(body, "not_offered", NOT_OFFERED).items():
        if name not in properties:
            properties[name] = {"enum": [*inert, None], "description": "Not offered; these values ask for nothing."}
    for name in getattr(body, "ignored", ()):
        properties[name] = {"description": "Accepted with any value, and not used."}


def _bound_tokens(schema: Any, vocab_size: int) -> None:
    """Bound the token ids anywhere in the schema of a prompt."""
    if isinstance(schema, dict):
        if schema.get("type") == "integer":
            schema |= {"minimum": 0, "maximum": vocab_size - 1}
        for inner in schema.values():
            _bound_tokens(inner, vocab_size)
    elif isinstance(schema, list):
        for inner in schema:
            _bound_tokens(inner, vocab_size)
