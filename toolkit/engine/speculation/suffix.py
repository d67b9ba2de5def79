"""Drafts from every text seen: the sequence itself, and those that finished (a rollout group's earlier completions)."""

from collections.abc import Sequence as Items
from weakref import WeakKeyDictionary

from toolkit.engine.request import Sequence
from toolkit.engine.speculation.drafter import Draft
from toolkit.engine.speculation.ngram import NgramDrafter

_BREAK = -1  # between texts: no token
_CONTEXT = 32  # tokens of a prompt that lead to its completion


class SuffixDrafter:
    """Finds the longest run of last tokens among its texts, and drafts what came after it.

    Half of ``max_tokens`` at a time is gathered in one ``SuffixAutomaton``; the one before it is kept until then.

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
        self._texts = [SuffixAutomaton()]
        self._matches: WeakKeyDictionary[Sequence, dict[SuffixAutomaton, Match]] = WeakKeyDictionary()

    def propose(self, sequences: Items[Sequence], most: Items[int]) -> list[Draft]:
        drafts = self.own.propose(sequences, most)
        for at, (sequence, count) in enumerate(zip(sequences, most, strict=True)):
            for found in self._found(sequence):
                length = min(found.length, self.longest)
                if length >= max(self.least, drafts[at].match + 1) and (tokens := found.continuation(count)):
                    drafts[at] = Draft(tokens, length)
        return drafts

    def observe(self, sequence: Sequence) -> None:
        self.own.observe(sequence)
        self._matches.pop(sequence, None)
        if len(self._texts[-1].tokens) >= self.max_tokens // 2:
            self._texts = [self._texts[-1], SuffixAutomaton()]
        first = max(0, sequence.prompt_length - _CONTEXT)
        for token in [*sequence.tokens[first:], _BREAK]:
            self._texts[-1].append(token)

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        self.own.close()
        self._matches.clear()
        self._texts = [SuffixAutomaton()]

    def _found(self, sequence: Sequence) -> "list[Match]":
        """How the sequence's last tokens end in each of the texts."""
        known = self._matches.setdefault(sequence, {})
        found = {text: known.get(text) or Match(text, self.longest) for text in self._texts}
        self._matches[sequence] = found
        for match in found.values():
            match.follow(sequence.tokens)
        return list(found.values())


class SuffixAutomaton:
    """All runs of tokens of a growing text, in memory and time that are linear in it.

    Source: Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985).

    Attributes:
        tokens: the text.
        next: of each state, the state behind each token.
        length: of each state, tokens of its longest run.
        link: of each state, the state of the longest shorter run that ends at more places; -1 of the empty run's.
        end: of each state, index after an occurrence of its runs, a late one.
    """

    _RECENT = 32  # links along which ``end`` is brought up to date

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.next: list[dict[int, int]] = [{}]
        self.length = [0]
        self.link = [-1]
        self.end = [0]
        self._last = 0

    def append(self, token: int) -> None:
        """Add a token to the text."""
        self.tokens.append(token)
        new = self._state({}, self.length[self._last] + 1, 0)
        at = self._last
        while at >= 0 and token not in self.next[at]:
            self.next[at][token] = new
            at = self.link[at]
        if at >= 0:
            target = self.next[at][token]
            if self.length[target] != self.length[at] + 1:
                split = self._state(dict(self.next[target]), self.length[at] + 1, self.link[target])
                while at >= 0 and self.next[at].get(token) == target:
                    self.next[at][token] = split
                    at = self.link[at]
                self.link[target] = target = split
            self.link[new] = target
        self._last = new
        for _ in range(self._RECENT):
            new = self.link[new]
            if new <= 0:
                break
            self.end[new] = len(self.tokens)

    def _state(self, following: dict[int, int], length: int, link: int) -> int:
        self.next.append(following)
        self.length.append(length)
        self.link.append(link)
        self.end.append(len(self.tokens))
        return len(self.next) - 1


class Match:
    """The longest run of a sequence's last tokens that a text has.

    Args:
        text: that may grow.
        longest: tokens of the run that matter; longer ones are found where nothing grew meanwhile.
    """

    def __init__(self, text: SuffixAutomaton, longest: int) -> None:
        self.text = text
        self.longest = longest
        self.length = 0
        self._state = 0
        self._read = 0
        self._grown = -1  # tokens that the text had when it was read last

    def follow(self, tokens: list[int]) -> None:
        """Read the tokens that came since the last time; the last ones again where the text has grown since."""
        text = self.text
        if len(text.tokens) != self._grown:
            self._grown = len(text.tokens)
            self.length = self._state = 0
            self._read = max(0, len(tokens) - self.longest)
        for token in tokens[self._read :]:
            while self._state and token not in text.next[self._state]:
                self._state = text.link[self._state]
                self.length = text.length[self._state]
            if token in text.next[self._state]:
                self._state = text.next[self._state][token]
                self.length += 1
        self._read = len(tokens)

    def continuation(self, count: int) -> list[int]:
        """At most ``count`` tokens that came after the run."""
        end = self.text.end[self._state]
        found = self.text.tokens[end : end + count]
        return found[: found.index(_BREAK)] if _BREAK in found else found
