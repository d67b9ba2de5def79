"""Checks of given values: each returns the value, or raises one sentence that names the field."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from toolkit.errors import ToolkitError, nearest
from toolkit.sentences import shown


def check_int(field: str, value: Any, low: int, high: int | None = None, also: str = "") -> int:
    """``value`` as an int within [low, high]. Raises ToolkitError for any other value.

    Args:
        field: the name in the error.
        value: what was given.
        low: the smallest int.
        high: the largest int; None for no bound.
        also: what the error says is possible besides, such as " or None".
    """
    good = isinstance(value, Integral) and not isinstance(value, bool)
    if not good or int(value) < low or (high is not None and int(value) > high):
        upper = "" if high is None else f" and <= {high}"
        raise ToolkitError(f"{field} must be an integer >= {low}{upper}{also}, got {shown(value)}.")
    return int(value)


def check_float(field: str, value: Any, low: float, high: float, open_low: bool = False) -> float:
    """``value`` as a finite float within [low, high]; above ``low`` with ``open_low``. Raises ToolkitError."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an int beyond all floats
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high or (open_low and number == low):
        lower = f"> {low:g}" if open_low else f">= {low:g}"
        upper = "" if math.isinf(high) else f" and <= {high:g}"
        raise ToolkitError(f"{field} must be a finite number {lower}{upper}, got {shown(value)}.")
    return number


def check_cut(field: str, value: Any) -> int:
    """``value`` as tokens that are kept, an int >= 1, or -1 for as many as fit. Raises ToolkitError for any other."""
    given = isinstance(value, Integral) and not isinstance(value, bool) and int(value) == -1
    return -1 if given else check_int(field, value, 1, also=", -1 or None")


def check_bool(field: str, value: Any) -> bool:
    """``value`` if it is a bool. Raises ToolkitError for any other value."""
    if not isinstance(value, bool):
        raise ToolkitError(f"{field} must be True or False, got {shown(value)}.")
    return value


def check_names(owner: str, given: Iterable[str], known: tuple[str, ...]) -> None:
    """Raise a ToolkitError for the first name in ``given`` that is not ``known``, with the nearest one that is."""
    for name in given:
        if name not in known:
            hint = nearest(name, known) or f"; it has {', '.join(known)}."
            raise ToolkitError(f"{owner} has no argument {name!r}{hint}")
