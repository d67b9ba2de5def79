"""Drafts from every text seen: the sequence itself, and those that finished (a rollout group's earlier completions)."""

from collections.abc import Sequence as Items

from toolkit.engine.request import Sequence
from toolkit.engine.speculation.drafter import Draft
from toolkit.engine.speculation.ngram import NgramDrafter
from toolkit.engine.speculation.text_index import Follower, TextIndex

_BREAK = -1  # between texts: no token
_CONTEXT = 32  # tokens of a prompt that lead to its completion


class SuffixDrafter:
    """Finds the longest run of last tokens among its texts, and drafts what came after it.

    Half of ``max_tokens`` at a time is gathered in one ``TextIndex``; the one before it is kept until then. A text is
    indexed when something is drafted next, so that where nothing is, it costs next to nothing.

    Args:
        least: tokens that a run must have.
        longest: tokens that are looked for at most.
        max_tokens: of finished sequences that are kept.
    """

    seconds_per_token = 0.0

    def __init__(self, least: int, longest: int, max_tokens: int) -> None:
        self.least = least
        self.longest = longest
        self.own = NgramDrafter(least, longest)
        self.max_tokens = max_tokens
        self._texts = [TextIndex(least)]
        self._finished: list[list[int]] = []  # texts that are not indexed yet
        self._waiting = 0  # their tokens
        self._followers: dict[Sequence, list[Follower]] = {}

    def propose(self, sequences: Items[Sequence], most: Items[int]) -> list[Draft]:
        self._index()
        drafts = self.own.propose(sequences, most)
        for at, (sequence, count) in enumerate(zip(sequences, most, strict=True)):
            for found in self._found(sequence):
                if found.length > drafts[at].match and (tokens := _until_break(found.text.tokens, found.end, count)):
                    drafts[at] = Draft(tokens, found.length)
        return drafts

    def observe(self, sequence: Sequence) -> None:
        self.own.observe(sequence)
        self._followers.pop(sequence, None)
        text = [*sequence.tokens[max(0, sequence.prompt_length - _CONTEXT) :], _BREAK]
        self._finished.append(text)
        self._waiting += len(text)
        if self._waiting > 2 * self.max_tokens:  # nothing was drafted for long
            self._shorten()

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        self.own.close()
        self._followers.clear()
        self._texts = [TextIndex(self.least)]
        self._finished, self._waiting = [], 0

    def _shorten(self) -> None:
        """Forget the first of the texts that wait, but for ``max_tokens`` of the last ones."""
        first, kept = len(self._finished), 0
        while kept < self.max_tokens:
            first -= 1
            kept += len(self._finished[first])
        self._finished, self._waiting = self._finished[first:], kept

    def _index(self) -> None:
        for text in self._finished:
            if len(self._texts[-1].tokens) >= self.max_tokens // 2:
                self._texts = [self._texts[-1], TextIndex(self.least)]
            self._texts[-1].extend(text)
        self._finished, self._waiting = [], 0

    def _found(self, sequence: Sequence) -> list[Follower]:
        """How the sequence's last tokens end in each of the texts."""
        known = self._followers.get(sequence)
        if known is None or [one.text for one in known] != self._texts:
            known = self._followers[sequence] = [Follower(text, self.longest) for text in self._texts]
        for one in known:
            one.follow(sequence.tokens)
        return known


def _until_break(tokens: list[int], start: int, count: int) -> list[int]:
    """At most ``count`` tokens from ``start`` on, of one text."""
    found = tokens[start : start + count]
    return found[: found.index(_BREAK)] if _BREAK in found else found
