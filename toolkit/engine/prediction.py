"""A predicted output, followed as the output grows: where in it the output is, and how much of it has come."""

from collections.abc import Sequence

import numpy as np

_LEAST = 2
"""Last tokens that must be found in the prediction before it is followed again."""
_LONGEST = 8
"""Last tokens that are looked for at most."""


class PredictedOutput:
    """How far an output follows its prediction.

    After a token that the prediction does not have there, its place is found again by the output's last tokens: the
    longest run of them that the prediction has, of several the first at or behind the place where it was left, else the
    last before it.

    Args:
        tokens: of the prediction.

    Attributes:
        match: tokens in a row, up to the last one of the output, that are those of the prediction; 0 where the output
            does not follow it.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = np.array(tokens, dtype=np.int64)
        self.match = 0
        self._next = 0  # index behind the last token that was followed
        self._came = np.zeros(len(tokens), dtype=np.bool_)
        self._last: list[int] = []
        self._empty = True

    @property
    def num_accepted(self) -> int:
        """Tokens of the prediction that the output has."""
        return int(self._came.sum())

    @property
    def num_rejected(self) -> int:
        """Tokens of the prediction that the output does not have."""
        return len(self.tokens) - self.num_accepted

    def follow(self, token: int) -> None:
        """The output grows by ``token``."""
        follows = (self.match > 0 or self._empty) and self._next < len(self.tokens)
        self._empty = False
        self._last = [*self._last[1 - _LONGEST :], token]
        if follows and self.tokens[self._next] == token:
            self._next, self.match = self._next + 1, self.match + 1
        else:
            end, self.match = self._find()
            self._next = end if self.match else self._next
        self._came[self._next - self.match : self._next] = True

    def draft(self, count: int) -> list[int]:
        """At most ``count`` tokens that the prediction has next."""
        found: list[int] = self.tokens[self._next : self._next + count].tolist() if self.match else []
        return found

    def _find(self) -> tuple[int, int]:
        """(index behind the longest run of last tokens, its length); (0, 0) where there is none of enough tokens."""
        ends = np.flatnonzero(self.tokens == self._last[-1]) + 1
        length = 1 if len(ends) else 0
        while length and length < len(self._last):
            room = ends[ends > length]
            longer = room[self.tokens[room - 1 - length] == self._last[-1 - length]]
            if not len(longer):
                break
            ends, length = longer, length + 1
        if length < _LEAST:
            return 0, 0
        ahead = ends[ends > self._next]
        return int(ahead[0] if len(ahead) else ends[-1]), length
