"""Prompt lookup: what followed the last tokens where the sequence had them before."""

from collections.abc import Sequence as Items
from weakref import WeakKeyDictionary

import numpy as np

from toolkit.engine.request import Sequence
from toolkit.engine.sampler import History
from toolkit.engine.speculation.drafter import Draft


class NgramDrafter:
    """Looks for the longest run of last tokens that the sequence has earlier too, and drafts what came after it.

    Source: Saxena, "Prompt Lookup Decoding" (2023).

    Args:
        least: tokens that a run must have.
        longest: tokens that are looked for at most.
    """

    seconds_per_token = 0.0

    def __init__(self, least: int, longest: int) -> None:
        self.least = least
        self.longest = longest
        self._histories: WeakKeyDictionary[Sequence, History] = WeakKeyDictionary()

    def propose(self, sequences: Items[Sequence], most: Items[int]) -> list[Draft]:
        return [self._draft(one, count) for one, count in zip(sequences, most, strict=True)]

    def observe(self, sequence: Sequence) -> None:
        self._histories.pop(sequence, None)

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        self._histories.clear()

    def _draft(self, sequence: Sequence, count: int) -> Draft:
        history = self._histories.get(sequence)
        if history is None:
            history = self._histories[sequence] = History(sequence)
        tokens = history.read()
        end, match = last_match(tokens, self.least, self.longest)
        return Draft(continuation(tokens, end, count), match) if match else Draft()


def last_match(tokens: np.ndarray, least: int, longest: int) -> tuple[int, int]:
    """Where the longest run of last tokens occurred before, the last time: (index after it, its length).

    (0, 0) where no run of ``least`` tokens occurred. Runs longer than ``longest`` count as so long.
    """
    ends = np.flatnonzero(tokens[:-1] == tokens[-1]) + 1 if len(tokens) > 1 else np.zeros(0, np.int64)
    length = 1 if len(ends) else 0
    while length and length < longest:
        room = ends[ends > length]
        longer = room[tokens[room - 1 - length] == tokens[-1 - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    return (int(ends[-1]), length) if length >= least else (0, 0)


def continuation(tokens: np.ndarray, start: int, count: int) -> list[int]:
    """``count`` tokens from ``start`` on; behind the last one it repeats, as a text of one period would."""
    found: list[int] = tokens[start : start + count].tolist()
    period = len(found)
    while len(found) < count:
        found.append(found[-period])
    return found
