"""Numbers of a configuration that could be a length, at which a model may begin to compute something else."""

from collections.abc import Iterator
from typing import Any

LARGEST = 1 << 22
"""No context is longer."""


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        if value == value and abs(value) <= LARGEST and float(value).is_integer():
            yield int(value)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _numbers(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _numbers(one)
    elif hasattr(value, "to_dict"):
        yield from _numbers(vars(value))


def thresholds(config: Any) -> list[int]:
    """Every integer from 2 on in a configuration and those inside it, ascending; [] without one.

    Of any name: original and maximal lengths, windows, chunks, lengths after which queries are scaled.
    """
    return sorted({number for number in _numbers(config) if number >= 2})


def around(config: Any) -> list[int]:
    """Positions before, at and after every threshold, and far beyond them, ascending."""
    found = {at + step for at in thresholds(config) for step in (-1, 0, 1)}
    return sorted(found | {3 * at + 7 for at in thresholds(config)})
