"""Errors about the fields that a client sent.

The engine and the tokenizer's part say in their own words what is wrong: ``max_tokens must be <= 5, got 9``.
A body says in ``field_names`` what it calls those fields, and ``naming`` puts its words in their place.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from toolkit.engine import EngineUnavailable
from toolkit.errors import ToolkitError
from toolkit.serving.errors import RequestError

FORM_KINDS = ("json", "json_object", "structural_tag")
"""Fields of ``structured_outputs`` that stand for a form in other words."""
_NAME = re.compile(r"(?<![\w'.])[a-z]+(?:_[a-z0-9]+)+(?![\w'])")
"""A field within a sentence: no other word has an underscore."""


def of_form(field: str) -> dict[str, str]:
    """Names for a body that says the form of the output in ``field``, in no words of ``structured_outputs``."""
    return {"structured_outputs": field} | {f"structured_outputs.{kind}": field for kind in FORM_KINDS}


def of_variables(fields: Mapping[str, str]) -> dict[str, str]:
    """Names for a body that sets variables of the chat template in ``fields``, by variable."""
    return {f"chat_template_kwargs.{name}": field for name, field in fields.items()}


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Raise ToolkitErrors of the block about the fields that ``names`` has in the place of others."""
    try:
        yield
    except ToolkitError as error:
        raise named(error, names) from None


def named(error: ToolkitError, names: Mapping[str, str]) -> ToolkitError:
    """``error`` about the fields of the request.

    Args:
        error: whose sentence begins with a field, or that says which it is about.
        names: of the request, by what the error may call them.
    """
    if isinstance(error, EngineUnavailable) or not names:
        return error
    head, got, value = str(error).partition(", got ")  # behind it stands what the client sent
    given = isinstance(error, RequestError)
    first, space, rest = head.partition(" ")
    about = error.param if isinstance(error, RequestError) else first.strip("':")
    found = _renamed(about or "", names)
    if found is not None:
        head = head.replace(f"'{about}'", f"'{found}'")
        if not given and not first.startswith("'"):
            head = f"'{found}'{space}{rest}"
    head = _NAME.sub(lambda name: names.get(name[0], name[0]), head)
    message = f"{head}{got}{value}"
    if isinstance(error, RequestError):
        return RequestError(message, found or error.param, error.status, error.code)
    return ToolkitError(message) if found is None else RequestError(message, found)


def _renamed(field: str, names: Mapping[str, str]) -> str | None:
    """``field`` in other words, with what stands behind it: ``stop[3]``, ``messages[0].content``."""
    for name in sorted(names, key=len, reverse=True):
        if field == name or field.startswith((f"{name}.", f"{name}[")):
            return names[name] + field[len(name) :]
    return None
