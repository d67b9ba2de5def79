"""The one exception type that users see for bad input.

Every message is a single sentence that names the field, the allowed values and the given one:
``max_num_seqs must be >= 1, got 0.``
"""

import re
from collections.abc import Iterable


class ToolkitError(ValueError):
    """A recipe, model, request or checkpoint cannot be used as given."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the allowed name closest to ``word``, or an empty string."""
    import difflib

    matches = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def must_be_one_of(field: str, value: object, allowed: Iterable[str]) -> str:
    """``"field must be one of a, b, got 'c'; did you mean 'b'?"``: the sentence for a value that is not listed."""
    names = list(allowed)
    return f"{field} must be one of {', '.join(names)}, got {value!r}{nearest(str(value), names) or '.'}"


def first_line(error: BaseException, with_class: bool = False, limit: int = 240) -> str:
    """The first line of an exception's message that says something, without its last period.

    A heading that ends in a colon gives way to the line below it. An exception without a message is its class name.

    Args:
        error: the exception.
        with_class: put the class name in front: ``"ValueError: math domain error"``.
        limit: characters of the message that are kept.
    """
    name = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return name
    line = lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]
    line = re.sub(r"^\w*Error: ", "", line)[:limit].rstrip(".: ")
    return f"{name}: {line}" if with_class else line
