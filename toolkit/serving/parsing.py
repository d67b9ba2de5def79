"""Request bodies out of JSON text; what is wrong with one becomes one sentence that names the field."""

import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from starlette.requests import HTTPConnection

from toolkit.sentences import sentence, shown, unknown_field
from toolkit.serving.errors import RequestError
from toolkit.serving.limits import check_structure

_VALIDATED = re.compile(r"function-(after|before|plain|wrap)\[")
"""What pydantic calls a kind of object with a validator, among several that a field may have."""
MAX_NAME = 200
"""Characters of an unknown field's name that an error repeats."""

Request = TypeVar("Request", bound=BaseModel)


def parse(kind: type[Request], raw: bytes) -> Request:
    """The request in the JSON text ``raw``. Raises ToolkitError, a RequestError most often, with one sentence."""
    check_structure(raw)
    if not raw:
        raise RequestError("The request body must be a JSON object, got none.")
    try:
        # Through Python's parser, because validators that run before the types need plain values.
        body = json.loads(raw)
        lone = b"\\ud" in raw.lower() and _has_lone_surrogate(body)
    except (json.JSONDecodeError, UnicodeError) as error:
        raise RequestError(f"The request body is not valid JSON ({str(error).rstrip('.')}).") from None
    except ValueError:  # Python converts no longer integers
        raise RequestError("The request body has a number of too many digits.") from None
    except RecursionError:
        raise RequestError("The request body has lists or objects nested too deep.") from None
    if lone:
        raise RequestError("The request body holds half of a surrogate pair, which is not valid Unicode text.")
    if not isinstance(body, dict):
        raise RequestError(f"The request body must be a JSON object, got {shown(body)}.")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _sentence(kind, error) from None


def parse_part(kind: type[Request], given: dict[str, Any], field: str) -> Request:
    """The object that a body has as its ``field``. Raises RequestError with one sentence."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _sentence(kind, error, (field,)) from None


def parse_query(kind: type[Request], request: HTTPConnection) -> Request:
    """The parameters behind the path of ``request``. Raises RequestError with one sentence."""
    given: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        field = kind.model_fields.get(name)
        if field is not None and get_origin(field.annotation) is list:
            given[name] = [*given.get(name, []), *value.split(",")]
        else:
            given[name] = value
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _sentence(kind, error) from None


def _has_lone_surrogate(body: Any) -> bool:
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _sentence(kind: type[BaseModel], error: ValidationError, outer: tuple[str, ...] = ()) -> RequestError:
    """What is wrong with an object of a ``kind``, which lies at the path ``outer``."""
    first = error.errors(include_url=False)[0]  # pydantic stops at a list's bound, so that there are not many
    owner, where = _owner_and_path(kind, list(first["loc"]))
    where = [*outer, *where]
    param = (
        "".join(f"[{part}]" if isinstance(part, int) else f".{part[:MAX_NAME]}" for part in where).lstrip(".") or None
    )
    if first["type"] == "extra_forbidden":
        fields = [field.alias or name for name, field in owner.model_fields.items()]
        return RequestError(unknown_field(str(param), str(where[-1]), fields), param)
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        found = (
            f"must be one of {first['ctx']['expected_tags']}, got {shown(first['ctx']['tag'])}"
            if ("tag" in first["ctx"])
            else "is required"
        )
        return RequestError(f"'{param}.type' {found}.", f"{param}.type")
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return RequestError(message, param or _quoted(message))
    return RequestError(sentence(first, f"'{param}'"), param)


def _owner_and_path(kind: type[BaseModel], loc: list[Any]) -> tuple[type[BaseModel], list[Any]]:
    """The model whose field an error is about, and the path of the field.

    Between an object and its fields pydantic names the kind of object where there are several; the path leaves it out.
    """
    owners: list[type[BaseModel]] = [kind]
    path: list[Any] = []
    for part in loc:
        if isinstance(part, str) and _VALIDATED.match(part):
            continue
        fields = [field for one in owners for name, field in one.model_fields.items() if part in (name, field.alias)]
        tagged = [one for one in owners if part in _tags(one)]
        if tagged and len(owners) > 1:  # before the name of a field, which may be the same
            owners = tagged
            continue
        path.append(part)
        nested = [model for field in fields for model in _models(field.annotation)]
        owners = nested or owners
    return owners[0], path


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("type")
    return get_args(field.annotation) if field is not None else ()


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models in an annotation, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _quoted(message: str) -> str | None:
    return message.split("'")[1] if message.startswith("'") else None
