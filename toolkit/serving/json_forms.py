"""The form of a JSON reply that a protocol asks for in its own words."""

from typing import Any

from toolkit.engine.grammar.terms import WHITESPACE
from toolkit.serving.errors import Json


def json_form(schema: dict[str, Any] | None = None) -> Json:
    """Arguments of ``StructuredOutputsParams`` for JSON of a schema, or for any object.

    Whitespace between its tokens is bounded, as in tool calls: small models write nothing else where it is not, and
    these protocols have no field for it. ``structured_outputs`` says it itself.
    """
    return {"json_object": True} | _BOUNDED if schema is None else {"json": schema} | _BOUNDED


_BOUNDED = {"whitespace_pattern": WHITESPACE}
