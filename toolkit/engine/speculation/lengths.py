"""How many drafted tokens a step verifies: as many as are estimated to bring the most tokens per second.

A row more costs little while a step is bound by reading weights, and as much as the first where it is bound by
arithmetic. Both the time of a step by its rows and the chance of a draft by its match are measured as the engine runs.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from heapq import nlargest

from toolkit.engine.speculation.drafter import Draft

_MEMORY = 0.98  # what a verdict weighs after the next one
_DOUBT = 1.0  # verdicts either way that nobody saw: a draft of unknown worth is as likely right as wrong
_FORGETS = 0.995  # what all verdicts weigh after a step that drafted nothing for their match
_SPEED = 0.2  # how fast the time of a step follows what is measured
_FADES = 0.999  # what a time is taken to be after a step of another size, so that a slow one is tried again
_LONGEST = 32  # matches above count as equal


class Chances:
    """The probability that a drafted token is right given those before it are, by the match that speaks for it."""

    def __init__(self) -> None:
        self._right: defaultdict[tuple[int, bool], float] = defaultdict(float)
        self._wrong: defaultdict[tuple[int, bool], float] = defaultdict(float)

    def of(self, draft: Draft) -> float:
        """The probability of one token."""
        at = _evidence(draft)
        right, wrong = self._right[at] + _DOUBT, self._wrong[at] + _DOUBT
        return right / (right + wrong)

    def saw(self, draft: Draft, accepted: int, drafted: int) -> None:
        """``accepted`` of ``drafted`` tokens were right; the next one, if any, was wrong and decides nothing more."""
        at = _evidence(draft)
        wrong = float(accepted < drafted)
        self._right[at] = self._right[at] * _MEMORY + accepted
        self._wrong[at] = self._wrong[at] * _MEMORY + wrong

    def passed_by(self, draft: Draft) -> None:
        """Nothing was drafted although there was something: it becomes unknown again by and by."""
        at = _evidence(draft)
        self._right[at] *= _FORGETS
        self._wrong[at] *= _FORGETS


def _evidence(draft: Draft) -> tuple[int, bool]:
    return min(draft.match, _LONGEST), draft.predicted


class StepTimes:
    """Seconds of a decode step by its rows, as measured; between and beyond what was measured by straight lines.

    Args:
        size: rows that a step of so many rows is padded to.
    """

    def __init__(self, size: Callable[[int], int]) -> None:
        self.size = size
        self._seconds: dict[int, float] = {}
        self._met: set[int] = set()

    def saw(self, rows: int, seconds: float) -> None:
        """A step took so long. The first of a size is not counted, which may have captured a graph."""
        size = self.size(rows)
        if size not in self._met:
            self._met.add(size)
            return
        before = self._seconds.get(size, seconds)
        for other in self._seconds:
            self._seconds[other] *= _FADES
        self._seconds[size] = before + _SPEED * (min(seconds, 2 * before) - before)  # one that waited counts little

    def of(self, rows: int) -> float | None:
        """The estimate; None where nothing was measured. What no step had yet is taken to cost next to nothing."""
        size = self.size(rows)
        if size in self._seconds:
            return self._seconds[size]
        below = max((one for one in self._seconds if one < size), default=None)
        above = min((one for one in self._seconds if one > size), default=None)
        if below is None:
            return None if above is None else self._seconds[above]
        if above is None:
            return self._seconds[below]
        share = (size - below) / (above - below)
        return self._seconds[below] + share * (self._seconds[above] - self._seconds[below])


def choose_lengths(
    drafts: Sequence[Draft], chances: Chances, times: StepTimes, rows: int, most: int, overhead: float = 0.0
) -> list[int]:
    """How many tokens of each draft to verify.

    Args:
        drafts: of the sequences.
        chances: of drafted tokens.
        times: of steps.
        rows: of the step without drafts.
        most: tokens that may be verified in all.
        overhead: seconds that it takes to draft.
    """
    candidates = []  # a token's chance to be reached and right, minus itself for order, and whose it is
    for at, draft in enumerate(drafts):
        chance, reached = chances.of(draft), 1.0
        for _ in draft.tokens:
            reached *= chance
            candidates.append((reached, at))
    best = nlargest(min(most, len(candidates)), candidates)
    lengths = [0] * len(drafts)
    plain = times.of(rows)
    if not best or plain is None:
        return lengths
    gained, fastest, taken = float(rows), rows / plain, 0
    for count, (chance, _) in enumerate(best, 1):
        gained += chance
        whole = count == len(best) or times.size(rows + count) != times.size(rows + count + 1)
        seconds = times.of(rows + count)
        if whole and seconds is not None and gained / (seconds + overhead) > fastest:
            fastest, taken = gained / (seconds + overhead), count
    for _, at in best[:taken]:
        lengths[at] += 1
    return lengths
