"""The one exception type that users see for bad input.

Every message is a single sentence that names the field, the allowed values and the given one:
``max_num_seqs must be >= 1, got 0.``
"""

import re
from collections.abc import Iterable


class ToolkitError(ValueError):
    """A recipe, model, request or checkpoint cannot be used as given."""


class OutOfVocabularyError(ToolkitError, IndexError):
    """A label is neither ignored nor a token id; an IndexError too, which torch's ``cross_entropy`` raises."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the allowed name that ``word`` misspells, or an empty string.

    A misspelling is at most 2 edits away, and at most half of the word: a farther name would mislead.
    """
    most = min(2, len(word) // 2)
    near = [(edit_distance(word, name), name) for name in allowed if abs(len(name) - len(word)) <= most]
    distance, name = min(near, key=lambda one: one[0], default=(most + 1, ""))
    return did_you_mean(name) if distance <= most else ""


def did_you_mean(name: str) -> str:
    """The hint that follows an unknown name."""
    return f"; did you mean '{name}'?"


def edit_distance(one: str, other: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours that turn ``one`` into ``other``."""
    two_above: list[int] = []
    above = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row = [i]
        for j, b in enumerate(other, 1):
            cost = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and b == one[i - 2]:
                cost = min(cost, two_above[j - 2] + 1)
            row.append(cost)
        two_above, above = above, row
    return above[-1]


def must_be_one_of(field: str, value: object, allowed: Iterable[str]) -> str:
    """``"field must be one of a, b, got 'c'; did you mean 'b'?"``: the sentence for a value that is not listed."""
    names = list(allowed)
    return f"{field} must be one of {', '.join(names)}, got {value!r}{nearest(str(value), names) or '.'}"


def described(error: BaseException) -> str:
    """What an exception says; of one that is no sentence for users, its class in front."""
    return str(error) if isinstance(error, ToolkitError) else f"{type(error).__name__}: {error}"


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
