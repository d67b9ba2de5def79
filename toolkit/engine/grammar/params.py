"""What an output must look like: vLLM's field names, checked when the object is made."""

import json
from collections import abc
from dataclasses import dataclass, fields
from typing import Any

from toolkit.chat.tokens import check_text
from toolkit.engine.checks import check_bool, check_names
from toolkit.errors import ToolkitError, first_line
from toolkit.sentences import shown

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The form of an output; exactly one of the first six fields.

    Args:
        json: a JSON schema, as a mapping or as its text; it is kept as text.
        regex: a regular expression in Rust's syntax, which the whole output matches.
        choice: texts, one of which is the output.
        grammar: a context-free grammar in llguidance's dialect of Lark, or in GBNF.
        json_object: True for any JSON object.
        structural_tag: free text in which each trigger begins a tag whose content follows a JSON schema, as a mapping
            or as its text: ``{"triggers": [...], "structures": [{"begin": ..., "schema": ..., "end": ...}]}``.
        disable_any_whitespace: no whitespace between the tokens of JSON.
        whitespace_pattern: a regular expression of the whitespace between the tokens of JSON.

    Raises:
        ToolkitError: for an unknown field, a bad value, or none or several of the first six.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        checked = {name: getattr(self, name) for name in ("regex", "grammar", "whitespace_pattern")}
        for name, value in checked.items():
            if value is not None and not (isinstance(value, str) and value):
                raise ToolkitError(f"{_NAME}.{name} must be a string that is not empty or None, got {shown(value)}.")
            _check_unicode(name, value or "")
        check_bool(f"{_NAME}.disable_any_whitespace", self.disable_any_whitespace)
        if self.json_object is not None:
            checked["json_object"] = check_bool(f"{_NAME}.json_object", self.json_object) or None
        checked["json"] = _json_text("json", self.json)
        checked["structural_tag"] = _json_text("structural_tag", self.structural_tag)
        checked["choice"] = _choices(self.choice)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ToolkitError(f"{_NAME} must have one of {', '.join(KINDS)}, got {' and '.join(given) or 'none'}.")
        if given[0] not in ("json", "json_object"):
            for name in ("disable_any_whitespace", "whitespace_pattern"):
                if getattr(self, name):
                    raise ToolkitError(
                        f"{_NAME}.{name} must be given with json or json_object, got it with {given[0]}."
                    )
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ToolkitError(
                f"{_NAME}.whitespace_pattern must be None with disable_any_whitespace, "
                f"got {shown(self.whitespace_pattern)}."
            )

    @property
    def kind(self) -> str:
        """Which of the first six fields is given."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @classmethod
    def read(cls, given: Any) -> "StructuredOutputsParams | None":
        """``given`` as an object of this class: one, a mapping of its fields, or None. Raises ToolkitError."""
        if given is None or isinstance(given, cls):
            return given
        if not isinstance(given, abc.Mapping):
            raise ToolkitError(f"{_NAME} must be a StructuredOutputsParams, a mapping of its fields or None, "
                               f"got {shown(given)}.")  # fmt: skip
        check_names("StructuredOutputsParams", map(_name, given), tuple(field.name for field in fields(cls)))
        return cls(**given)


_NAME = "structured_outputs"


def _json_text(field: str, given: Any) -> str | None:
    """A JSON object as text; None for None."""
    if given is None:
        return None
    try:
        value = json.loads(given) if isinstance(given, str) else given
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ToolkitError(
            f"{_NAME}.{field} must be a JSON object or its text, got {shown(given)} ({first_line(error)})."
        ) from None
    if not isinstance(value, dict):
        raise ToolkitError(f"{_NAME}.{field} must be a JSON object or its text, got {shown(given)}.")
    _check_unicode(field, text)
    return text


def _choices(given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    if not isinstance(given, list | tuple) or not given or not all(isinstance(one, str) and one for one in given):
        raise ToolkitError(
            f"{_NAME}.choice must be a list of strings, at least one and none of them empty, got {shown(given)}."
        )
    for one in given:
        _check_unicode("choice", one)
    return tuple(given)


def _name(field: Any) -> str:
    return field if isinstance(field, str) else shown(field)


def _check_unicode(field: str, text: str) -> None:
    try:
        check_text(text)
    except ToolkitError as error:
        raise ToolkitError(f"{_NAME}.{field}: {error}") from None
