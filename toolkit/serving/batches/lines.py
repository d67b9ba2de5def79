"""The lines of a batch's input file, checked, and those of its output and error files."""

import json
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.sentences import shown
from toolkit.serving.errors import Json
from toolkit.strict_json import strict_json

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_LINES = 50_000
"""Requests of a batch, as OpenAI has it."""
MAX_ERRORS = 100
"""Of a file that are listed."""
LOWEST_PRIORITY = 2**63 - 1
_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True)
class Line:
    """One request.

    Args:
        custom_id: by which its result is found.
        url: of the endpoint.
        body: of the request.
    """

    custom_id: str
    url: str
    body: dict[str, Any]

    @property
    def raw(self) -> bytes:
        """The body as it is sent: whoever waits for a response goes first."""
        return strict_json({**self.body, "priority": LOWEST_PRIORITY}).encode()


@dataclass(frozen=True)
class LineError:
    """What is wrong with a line of an input file.

    Args:
        code: a name for programs.
        message: one sentence.
        line: its number, from 1; None for the file.
        param: the field at fault.
    """

    code: str
    message: str
    line: int | None = None
    param: str | None = None


def check_file(path: Path, endpoints: Collection[str] = ENDPOINTS) -> tuple[int, list[LineError]]:
    """(requests of a file, what is wrong with it)."""
    count, errors, seen = 0, list[LineError](), set[str]()
    for number, found in _read(path, endpoints):
        count += 1
        if isinstance(found, LineError):
            errors.append(found)
        elif found.custom_id in seen:
            message = f"'custom_id' of a line must be no other line's, got {shown(found.custom_id)} again."
            errors.append(LineError("duplicate_custom_id", message, number, "custom_id"))
        else:
            seen.add(found.custom_id)
        if count > MAX_LINES:
            errors = [LineError("too_many_tasks", f"A batch must have <= {MAX_LINES} requests, got more.")]
        if count > MAX_LINES or len(errors) >= MAX_ERRORS:
            break
    if not count:
        errors.append(LineError("empty_file", "A batch must have >= 1 requests, got none."))
    return count, errors


def lines_of(path: Path) -> Iterator[Line]:
    """The requests of a file that ``check_file`` finds right, in order, read as they are taken."""
    for _, found in _read(path, ENDPOINTS):
        assert isinstance(found, Line)
        yield found


def names_of(path: Path) -> list[str]:
    """Names of models in the requests of a file that is right, in order, each once."""
    names = (line.body.get("model") for line in lines_of(path))
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def _read(path: Path, endpoints: Collection[str]) -> Iterator[tuple[int, Line | LineError]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield number, _line(raw, number, endpoints)


def _line(raw: bytes, number: int, endpoints: Collection[str]) -> Line | LineError:
    def wrong(message: str, param: str | None = None, code: str = "invalid_request") -> LineError:
        return LineError(code, message, number, param)

    try:
        given = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return wrong(f"A line must be JSON, got what is not ({str(error).splitlines()[0]}).", code="invalid_json_line")
    try:
        json.dumps(given, allow_nan=False)
    except (ValueError, RecursionError):
        message = "A line must have finite numbers, and objects that are not nested too deep."
        return wrong(message, code="invalid_json_line")
    if not isinstance(given, dict):
        return wrong(f"A line must be a JSON object, got {shown(given)}.", code="invalid_json_line")
    unknown = next((name for name in given if name not in _FIELDS), None)
    if unknown is not None:
        return wrong(f"A line must have {', '.join(map(repr, _FIELDS))} alone, got {shown(unknown)}.", unknown)
    identity, method, url, body = (given.get(name) for name in _FIELDS)
    if not isinstance(identity, str) or not 0 < len(identity) <= 512:
        return wrong(f"'custom_id' must be text of 1 to 512 characters, got {shown(identity)}.", "custom_id")
    if method != "POST":
        return wrong(f"'method' must be 'POST', got {shown(method)}.", "method")
    if url not in endpoints:
        which = " or ".join(map(repr, endpoints))
        return wrong(f"'url' must be {which}, got {shown(url)}.", "url", "mismatched_url")
    if not isinstance(body, dict):
        return wrong(f"'body' must be a JSON object, got {shown(body)}.", "body")
    if body.get("stream"):
        return wrong(f"'body.stream' must be false in a batch, got {shown(body['stream'])}.", "body.stream")
    return Line(identity, str(url), body)


def result(line: Line, status: int, request_id: str, body: bytes) -> Json:
    """A line of an output file, or of an error file where the status is no success."""
    response = {"status_code": status, "request_id": request_id, "body": json.loads(body)}
    return {"id": _identity(), "custom_id": line.custom_id, "response": response, "error": None}


def failure(line: Line, code: str, message: str) -> Json:
    """A line of an error file, for a request that was not made."""
    return {
        "id": _identity(),
        "custom_id": line.custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }


def _identity() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


def written(found: Json) -> bytes:
    """A line of a file, in ASCII: readers split lines at other characters than the end of a line, too."""
    return strict_json(found, separators=(",", ":")).encode() + b"\n"
