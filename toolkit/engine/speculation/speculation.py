"""Drafts for the running sequences before a step, and what became of them after it."""

import time
import warnings
from collections.abc import Callable
from collections.abc import Sequence as Items

from toolkit.engine.request import Sequence
from toolkit.engine.scheduler import Chunk
from toolkit.engine.speculation.config import SpeculativeConfig
from toolkit.engine.speculation.drafter import Draft, Drafter
from toolkit.engine.speculation.lengths import Chances, StepTimes, choose_lengths
from toolkit.engine.speculation.prediction import PredictionDrafter
from toolkit.errors import described

_SPEED = 0.2  # how fast the time to draft follows what is measured
_NEXT_TO_NONE = 0.005  # of the time of a step
_PAUSES = 15, 255  # steps: the longest pause, where looking is cheap, and where it is dear
_OF_LOOKING = 0.005  # of the time of the steps between two fruitless looks
_UNMATCHED = Draft()  # what speaks for the drafts of a model


class Speculation:
    """Decides what is drafted in an engine: of a request's predicted output first, else by the configured drafter.

    Args:
        config: by which method, and how much.
        drafter: that does it.
        padded_size: rows that a decode step of so many rows is padded to.
        max_rows: of a step with drafts.

    Attributes:
        failed: whether the drafter raised.
        draft_seconds: what it takes lately to look for a step's drafts, in texts.
        num_drafts: drafts that were verified.
        num_draft_tokens: their tokens.
        num_accepted_tokens: those of them that were right.
        num_accepted_tokens_per_pos: drafts whose first, second, ... token was right.
    """

    def __init__(
        self, config: SpeculativeConfig, drafter: Drafter, padded_size: Callable[[int], int], max_rows: int
    ) -> None:
        self.config = config
        self.drafter = drafter
        self.max_rows = max_rows
        self.failed = False
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        self.num_accepted_tokens_per_pos = [0] * config.num_speculative_tokens
        self._chances = Chances()
        self._times = StepTimes(padded_size)
        self._drafted: dict[Sequence, Draft] = {}
        self._predictions = PredictionDrafter()
        self.draft_seconds = 0.0
        self._pause = self._rest = 0  # steps without a look for drafts: after the next fruitless one, and left

    def draft(self, running: Items[Sequence]) -> None:
        """Set ``Sequence.draft`` of the sequences that decode in the next step.

        A drafter that fails is not asked again: what it was for is speed, and no request depends on it.
        """
        for sequence in self._drafted:
            sequence.draft = []
        self._drafted = {}
        self._rest -= 1
        if self.failed or self._rest > 0:
            return
        # Behind the last token of a prompt the other completions of it are forked first.
        decoding = [one for one in running if one.remaining == 1 and one.generated]
        if not 0 < len(decoding) < self.max_rows:
            return
        try:
            self._draft(decoding)
        except Exception as error:
            self.failed = True
            reason = described(error)
            warnings.warn(f"speculative decoding is off, its drafter failed: {reason}", stacklevel=2)

    def _draft(self, decoding: list[Sequence]) -> None:
        started = time.perf_counter()
        drafts = self._drafts(decoding)
        seconds = time.perf_counter() - started
        lengths = [len(draft.tokens) for draft in drafts]
        if self.config.adaptive:
            if not self.drafter.seconds_per_token:
                self.draft_seconds += _SPEED * (seconds - self.draft_seconds)
            room = self.max_rows - len(decoding)
            lengths = choose_lengths(drafts, self._chances, self._times, len(decoding), room, self.draft_seconds)
            # To look for drafts that nobody wants takes time as well: ever more rarely then, unless it is next to none.
            step = self._times.of(len(decoding)) or 0.0
            cheap = self.draft_seconds <= _NEXT_TO_NONE * step
            least, most = _PAUSES
            longest = min(max(least, int(self.draft_seconds / (_OF_LOOKING * step))), most) if step else least
            self._pause = 0 if any(lengths) or cheap else min(2 * self._pause + 1, longest)
            self._rest = self._pause
        for sequence, draft, length in zip(decoding, drafts, lengths, strict=True):
            sequence.draft = draft.tokens[:length]
            if length:
                self._drafted[sequence] = draft
            elif draft.tokens:
                self._chances.passed_by(draft)

    def verified(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """``accepted`` of the ``drafted`` tokens of the sequence that ran were right; its draft is used up."""
        self.num_drafts += 1
        self.num_draft_tokens += drafted
        self.num_accepted_tokens += accepted
        for at in range(accepted):
            self.num_accepted_tokens_per_pos[at] += 1
        self._chances.saw(self._drafted[sequence], accepted, drafted)

    def ran(self, chunks: Items[Chunk], seconds: float) -> None:
        """A step of these chunks took so long. Of a pause the last step counts alone: the others cost nothing."""
        if self._rest <= 1 and all(chunk.decodes for chunk in chunks):
            self._times.saw(sum(chunk.count for chunk in chunks), seconds)

    def stats(self) -> dict[str, float]:
        """Totals under vLLM's names."""
        return {
            "spec_decode_num_drafts": self.num_drafts,
            "spec_decode_num_draft_tokens": self.num_draft_tokens,
            "spec_decode_num_accepted_tokens": self.num_accepted_tokens,
        }

    def _drafts(self, sequences: list[Sequence]) -> list[Draft]:
        """None longer than what may follow: the token behind a draft is sampled too."""
        left = {one: one.request.max_tokens - one.generated - 1 for one in sequences}
        most = [max(0, min(self.config.num_speculative_tokens, left[one])) for one in sequences]
        drafts = dict(zip(sequences, self._predictions.propose(sequences, most)))
        others = [one for one in sequences if not drafts[one].tokens]
        longest = self._longest(len(sequences)) if others else 0
        asked = [(one, count) for one in others if (count := min(longest, left[one])) > 0]
        if asked:
            found = self.drafter.propose([one for one, _ in asked], [count for _, count in asked])
            drafts.update((one, draft) for (one, _), draft in zip(asked, found, strict=True))
        return [_within_grammar(one, drafts[one]) for one in sequences]

    def _longest(self, rows: int) -> int:
        """Most tokens of a draft: fewer than configured, or none, where making them takes longer than they may save."""
        each, plain, most = self.drafter.seconds_per_token, self._times.of(rows), self.config.num_speculative_tokens
        if not (each and self.config.adaptive) or plain is None:
            return most
        gained, fastest, longest = 1.0, 1 / plain, 0
        for count in range(1, most + 1):
            gained += self._chances.of(_UNMATCHED) ** count
            seconds = (self._times.of(rows * (1 + count)) or plain) + count * each
            if gained / seconds > fastest:
                fastest, longest = gained / seconds, count
        if not longest:
            self._chances.passed_by(_UNMATCHED)
        return longest


def _within_grammar(sequence: Sequence, draft: Draft) -> Draft:
    """The draft up to the first token that the sequence's grammar forbids, which would not be sampled.

    With ``ignore_eos`` an output continues behind the end of its grammar, where no mask of a draft reaches: the draft
    ends before it.
    """
    if sequence.matcher is not None:
        tokens, ends = draft.tokens, sequence.request.eos - sequence.request.stop_ids
        first = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
        draft.tokens = tokens[: sequence.matcher.allowed_prefix(tokens[:first])]
    return draft
