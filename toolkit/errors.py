"""The one exception type that users see for bad input.

Every message is a single sentence that names the field, the value and what is allowed.
"""


class ToolkitError(ValueError):
    """A recipe, model, request or checkpoint cannot be used as given."""


def nearest(word: str, allowed: list[str] | tuple[str, ...]) -> str:
    """``"; did you mean 'x'?"`` for the allowed name closest to ``word``, or an empty string."""
    import difflib

    matches = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""
