"""What adapters of TRL's clients share: names of TRL's modules with other values, and errors of its clients."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from toolkit.errors import ToolkitError

_REFUSED = re.compile(r"Request failed: (\d+), (.*)", re.DOTALL)


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """A module with another value of a name, until the block ends."""
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


def error_of(error: Exception, what: str) -> Exception:
    """``error`` of TRL's clients, or the server's sentence where it refused ``what``.

    The clients raise plain exceptions, with the response in the message.
    """
    refused = _REFUSED.fullmatch(str(error))
    if refused is None:
        return error
    try:
        sentence = str(json.loads(refused[2])["error"]["message"])
    except (ValueError, KeyError, TypeError):
        sentence = refused[2].strip()
    return ToolkitError(f"The server refused {what}: {sentence}")
