"""The JSON schema of recipes, for editors: fields with their texts, types, ranges and the objective of each kind."""

import ast
import inspect
import json
import textwrap
from typing import Any

from pydantic import BaseModel

from toolkit.config.objective import OBJECTIVES
from toolkit.config.schema import Recipe

FILE_NAME = "recipe.schema.json"
_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of a recipe's YAML. What one field asks of another is not in it."""
    schema = Recipe.model_json_schema()
    definitions: dict[str, Any] = schema.pop("$defs")
    del definitions["ObjectiveSection"]
    classes: list[type[BaseModel]] = [Recipe]
    cases = []
    for kind in OBJECTIVES.names():
        section = OBJECTIVES.find("objective.kind", kind)
        own = section.model_json_schema()
        definitions |= own.pop("$defs", {})
        definitions[section.__name__] = own
        classes.append(section)
        of_kind = {"properties": {"kind": {"const": kind}}, "required": ["kind"]}
        cases.append({"if": of_kind, "then": {"$ref": f"#/$defs/{section.__name__}"}})
    for one in _sections(classes):
        _describe(schema if one is Recipe else definitions[one.__name__], one)
    fields = schema["properties"]
    fields["objective"] = {
        "type": "object",
        "description": "What is minimised; without it kind is pretrain.",
        "properties": {"kind": {"enum": OBJECTIVES.names()}},
        "required": ["kind"],
        "allOf": cases,
    }
    fields["resume_from_checkpoint"] |= {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": r"^step-\d+$"}]}
    quantise = definitions["ModelSection"]["properties"]["quantise"]
    quantise["anyOf"].insert(0, definitions["QuantiseSection"]["properties"]["format"])
    distributed = definitions["TrainSection"]["properties"]["distributed"]
    strategy = definitions["DistributedSection"]["properties"]["strategy"]
    names = {name: value for name, value in strategy.items() if name in ("enum", "type")}
    distributed["anyOf"] = [names, {"$ref": distributed.pop("$ref")}]
    # YAML 1.1 reads no as false.
    precision = definitions["TrainSection"]["properties"]["mixed_precision"]
    precision |= {"enum": [*precision["enum"], False], "type": ["string", "boolean"]}
    return {"$schema": _DRAFT, **schema, "title": "toolkit recipe", "$defs": dict(sorted(definitions.items()))}


def schema_text() -> str:
    """The schema as the text of a file."""
    return json.dumps(recipe_schema(), indent=1) + "\n"


def _sections(classes: list[type[BaseModel]]) -> list[type[BaseModel]]:
    """The classes and all classes of their fields."""
    found: dict[type[BaseModel], None] = {}
    waiting = list(classes)
    while waiting:
        section = waiting.pop()
        if section in found:
            continue
        found[section] = None
        for field in section.model_fields.values():
            waiting += _models(field.annotation)
    return [section for section in found if section.__name__ != "ObjectiveSection"]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def _describe(schema: dict[str, Any], section: type[BaseModel]) -> None:
    """Give the fields of a section's schema the texts below them in its code."""
    schema["description"] = _text(section.__doc__ or "")
    texts: dict[str, str] = {}
    for one in reversed(section.__mro__):
        if issubclass(one, BaseModel) and one is not BaseModel:
            texts |= field_texts(one)
    for name, field in schema["properties"].items():
        field.pop("title", None)
        if name in texts:
            field["description"] = texts[name]


def field_texts(section: type[BaseModel]) -> dict[str, str]:
    """The string below each field of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for one, after in zip(body.body, body.body[1:]):
        if (
            isinstance(one, ast.AnnAssign)
            and isinstance(one.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[one.target.id] = _text(after.value.value)
    return found


def _text(docstring: str) -> str:
    return " ".join(docstring.replace("``", "`").split())
