"""Prompt lookup: what followed the last tokens where the sequence had them before."""

from collections.abc import Sequence as Items

from toolkit.engine.request import Sequence
from toolkit.engine.speculation.drafter import Draft
from toolkit.engine.speculation.text_index import Follower, TextIndex


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
        self._followers: dict[Sequence, Follower] = {}

    def propose(self, sequences: Items[Sequence], most: Items[int]) -> list[Draft]:
        return [self._draft(one, count) for one, count in zip(sequences, most, strict=True)]

    def observe(self, sequence: Sequence) -> None:
        self._followers.pop(sequence, None)

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        self._followers.clear()

    def _draft(self, sequence: Sequence, count: int) -> Draft:
        found = self._followers.get(sequence)
        if found is None:
            found = self._followers[sequence] = Follower(TextIndex(self.least), self.longest, own=True)
        found.follow(sequence.tokens)
        return Draft(continuation(sequence.tokens, found.end, count), found.length) if found.length else Draft()


def continuation(tokens: list[int], start: int, count: int) -> list[int]:
    """``count`` tokens from ``start`` on; behind the last one it repeats, as a text of one period would."""
    found = tokens[start : start + count]
    period = len(found)
    while len(found) < count:
        found.append(found[-period])
    return found
