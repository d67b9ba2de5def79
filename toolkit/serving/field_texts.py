"""What docstrings say about the fields of bodies, for the OpenAPI document."""

import inspect
import re
from functools import cache

from pydantic import BaseModel

from toolkit.engine import SamplingParams

_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")


@cache
def field_texts(body: type[BaseModel]) -> dict[str, str]:
    """A text for each field that the docstring of ``body``, of a class below it or of ``SamplingParams`` describes."""
    found: dict[str, str] = {}
    for one in (SamplingParams, *reversed(body.__mro__)):
        if one is SamplingParams or issubclass(one, BaseModel):
            found |= entries(one.__doc__ or "")
    return {name: text for name, text in found.items() if name in body.model_fields}


def entries(docstring: str) -> dict[str, str]:
    """The entries under "Args:"; those of several names under each."""
    _, _, block = inspect.cleandoc(docstring).partition("Args:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in block.splitlines():
        if not line.startswith("    "):
            break
        entry = _ENTRY.fullmatch(line[4:])
        if entry is not None:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif line.startswith("        "):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found
