"""One sentence for a pydantic error: ``X must be >= 1, got 3.``"""

from collections.abc import Iterable, Mapping
from typing import Any

from toolkit.errors import nearest

_REQUIREMENTS = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of fields",
    "model_type": "a mapping of fields",
    "model_attributes_type": "a mapping of fields",
    "finite_number": "a finite number",
    "greater_than": "> {gt}",
    "greater_than_equal": ">= {ge}",
    "less_than": "< {lt}",
    "less_than_equal": "<= {le}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "too_few_fields": "a mapping of at least {min_length} fields",
    "too_many_fields": "a mapping of at most {max_length} fields",
    "string_too_short": "text of at least {min_length} character",
    "string_too_long": "text of at most {max_length} characters",
    "literal_error": "one of {expected}",
}
_OF_FIELDS = {"too_short": "too_few_fields", "too_long": "too_many_fields"}
"""Kinds of problems that pydantic has one name for, of lists and of objects."""


def sentence(problem: Mapping[str, Any], field: str, *, requirement: str | None = None, nullable: bool = False) -> str:
    """What a value must be, and what it is.

    Args:
        problem: an entry of ``ValidationError.errors()`` about a missing value, a type or a range.
        field: the field as the user writes it.
        requirement: what the value must be, for errors that pydantic words badly (patterns).
        nullable: null is allowed too.
    """
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "missing":
        return f"{field} is required."
    if requirement is None:
        message = problem["msg"].removeprefix("Input should be ")
        if isinstance(problem["input"], Mapping):
            kind = _OF_FIELDS.get(kind, kind)
        requirement = (
            _REQUIREMENTS[kind].format(**{name: _plain(value) for name, value in context.items()})
            if kind in _REQUIREMENTS
            else message[0].lower() + message[1:]
        )
    return f"{field} must be {requirement}{' or null' if nullable else ''}, got {shown(problem['input'])}."


def _plain(value: Any) -> Any:
    """A limit without a needless fraction; integers keep every digit."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def unknown_field(field: str, last: str, allowed: Iterable[str]) -> str:
    """An unknown field, with the allowed one closest to its ``last`` part."""
    return f"Unknown field {shown(field)}{nearest(last, list(allowed)) or '.'}"


def shown(value: Any, limit: int = 60) -> str:
    """``value`` as a message shows it, cut to ``limit`` characters. The cost does not grow with the value."""
    text = ascii(value[: limit + 1]) if isinstance(value, str) else _beginning(value, limit)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _beginning(value: Any, limit: int) -> str:
    """``repr(value)``, or more than ``limit`` characters of its beginning."""
    if isinstance(value, str):
        return repr(value[: limit + 1])
    if isinstance(value, int) and value.bit_length() > 8 * limit:  # Python refuses to write very long ones
        return f"an integer of {value.bit_length()} bits"
    if type(value) not in (list, tuple, dict) or not value:
        return repr(value)
    brackets = "{}" if isinstance(value, dict) else "[]" if isinstance(value, list) else "()"
    text = brackets[0]
    for item in value.items() if isinstance(value, dict) else value:
        if len(text) > limit:
            return text
        parts = item if isinstance(value, dict) else (item,)
        text += ", " * (len(text) > 1) + ": ".join(_beginning(part, limit - len(text)) for part in parts)
    return text + "," * (isinstance(value, tuple) and len(value) == 1) + brackets[1]
