"""Logits to tokens: the changes of requests, penalties, grammars, cut tails, and one sample per row.

A row is a place in a sequence: behind its tokens, or behind some that are drafted after them. Sampling is
batch-invariant: a row's token depends on that row's logits and what stands before it in its own sequence only. It is a
function of (seed of the sequence, tokens so far, logits), so a preempted sequence continues as it would have, and what
is sampled behind drafted tokens is what would be sampled once they were accepted.
Shapes: B rows, V vocabulary.
"""

import itertools
import math
import operator
from collections import abc
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from toolkit.engine.adjustments import adjusted_logits
from toolkit.engine.grammar.masks import GrammarMasks
from toolkit.engine.logprobs import top_logprobs, upcast
from toolkit.engine.order import first_largest
from toolkit.engine.params import SamplingParams
from toolkit.engine.request import Sequence
from toolkit.engine.samplers import cut_tails, penalised_by_dry
from toolkit.engine.step.sampling import EVERYTHING
from toolkit.ops.sample import penalize, sample
from toolkit.ops.token_logprob import token_logprob

_NOTHING = np.zeros(0, dtype=np.int64)


SampledRow = tuple[int, float, float, dict[int, float] | None, str | None]
"""A row of ``Samples``."""


@dataclass(slots=True)
class Samples:
    """The sampled tokens of a batch, one entry per row.

    Args:
        token_ids: the tokens.
        logprobs: of the tokens, by the model.
        sampling_logprobs: of the tokens, by the distribution that they were sampled from.
        top_logprobs: the most probable tokens where asked for.
        errors: what went wrong with the row, if anything.
    """

    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    top_logprobs: list[dict[int, float] | None]
    errors: list[str | None]

    def rows(self) -> abc.Iterator[SampledRow]:
        """Of each row its token, log-probabilities, most probable tokens and error."""
        return zip(self.token_ids, self.logprobs, self.sampling_logprobs, self.top_logprobs, self.errors)


class BatchParams:
    """What a batch of rows of these sequences needs at every step and no step changes."""

    def __init__(self, sequences: abc.Sequence[Sequence], device: torch.device) -> None:
        self.sequences = tuple(sequences)
        self.device = device
        params = [one.params for one in sequences]
        self.temperature = self.floats([0.0 if one.greedy else one.temperature for one in params])
        self.top_k = self.integers([min(one.top_k, EVERYTHING) for one in params])
        self.top_p = self.floats([one.top_p for one in params])
        self.min_p = self.floats([one.min_p for one in params])
        self.seeds = self.integers([one.seed for one in sequences])
        if any(one.penalised or one.min_tokens or one.dry_multiplier > 0 for one in params):
            self.repetition = self.floats([one.repetition_penalty for one in params])
            self.frequency = self.floats([one.frequency_penalty for one in params])
            self.presence = self.floats([one.presence_penalty for one in params])
            self.prompt_lengths = self.integers([one.prompt_length for one in sequences])
        self.histories = {one: History(one) for one in dict.fromkeys(sequences) if one.params.penalised}

    def holds(self, sequences: abc.Sequence[Sequence], device: torch.device) -> bool:
        """Whether it was made for these sequences, in this order."""
        mine = self.sequences
        return device == self.device and len(mine) == len(sequences) and all(map(operator.is_, mine, sequences))

    def integers(self, values: abc.Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device)

    def floats(self, values: abc.Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(self.device)

    def penalties(self, logits: Tensor, drafts: abc.Sequence[int]) -> Tensor:
        """New logits after the penalties, and with the ending tokens suppressed before ``min_tokens``."""
        lists = [
            self.histories[one].read(drafted) if one in self.histories else _NOTHING
            for one, drafted in zip(self.sequences, drafts)
        ]
        vocabulary = logits.shape[-1]
        suppressed = [
            [token for token in one.request.stop_ids if token < vocabulary]
            if one.generated + drafted < one.params.min_tokens
            else []
            for one, drafted in zip(self.sequences, drafts)
        ]
        return penalize(
            logits,
            torch.from_numpy(np.concatenate(lists)).to(self.device),
            self.integers([0, *itertools.accumulate(map(len, lists))]),
            self.prompt_lengths,
            self.repetition,
            self.frequency,
            self.presence,
            self.integers(list(itertools.chain.from_iterable(suppressed))),
            self.integers([0, *itertools.accumulate(map(len, suppressed))]),
        )


class History:
    """The tokens of one sequence, and those drafted behind them, as an array that grows with it."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self._tokens = np.array(sequence.tokens, dtype=np.int64)
        self._count = len(sequence.tokens)

    def read(self, drafted: int = 0) -> np.ndarray:
        """The tokens so far and the first ``drafted`` of the draft [N]; valid until the sequence grows."""
        tokens, draft = self.sequence.tokens, self.sequence.draft
        whole = len(tokens) + len(draft)
        if whole > len(self._tokens):
            self._tokens = np.concatenate([self._tokens[: self._count], np.empty(whole, dtype=np.int64)])
        self._tokens[self._count : len(tokens)] = tokens[self._count :]
        self._tokens[len(tokens) : whole] = draft
        self._count = len(tokens)
        return self._tokens[: self._count + drafted]


class Sampler:
    """Samples batch after batch. Tensors of parameters are kept while the same sequences come in the same order.

    Args:
        masks: of sequences with a grammar; None where there are none.
    """

    def __init__(self, masks: GrammarMasks | None = None) -> None:
        self._masks = masks
        self._batch_params: BatchParams | None = None

    def prepare(self, drafts: abc.Iterable[tuple[Sequence, int]]) -> None:
        """Begin what needs no logits, so that it is done while the model runs.

        Args:
            drafts: the sequences that will be sampled of, each with how many of its drafted tokens run.
        """
        if self._masks is not None:
            self._masks.start((one.matcher, one.draft[:count]) for one, count in drafts if one.matcher is not None)

    def abandon(self) -> None:
        """End what was prepared, since no logits come."""
        if self._masks is not None:
            self._masks.finish()

    def close(self) -> None:
        """End its thread."""
        if self._masks is not None:
            self._masks.close()

    def sample(
        self,
        logits: Tensor,
        sequences: abc.Sequence[Sequence],
        drafts: abc.Sequence[int] | None = None,
        top: bool = True,
    ) -> Samples:
        """A token of each row of ``logits`` [B, V] (the model's own).

        Args:
            logits: after all tokens of the row's sequence and ``drafts`` of those drafted behind them.
            sequences: of each row.
            drafts: of each row; None for 0 each.
            top: whether the most probable tokens are wanted of those who asked for them.
        """
        drafts = [0] * len(sequences) if drafts is None else drafts
        logits = upcast(logits)
        sampled: Tensor | None = None
        rows = list(zip(sequences, drafts))
        own, failures = adjusted_logits(logits, rows)
        penalised = any(one.penalised(drafted) or one.params.dry_multiplier > 0 for one, drafted in rows)
        if own is logits and not penalised and all(one.params.greedy for one in sequences):
            scores, wrong = self._masked(own, own, sequences, drafts)
            ids = first_largest(scores)
        else:
            batch = self._batch_params
            if batch is None or not batch.holds(sequences, logits.device):
                batch = self._batch_params = BatchParams(sequences, logits.device)
            scores = penalised_by_dry(batch.penalties(own, drafts), rows) if penalised else own
            scores, wrong = self._masked(own, scores, sequences, drafts)
            scores = cut_tails(scores, rows)
            steps = batch.integers([one.generated + drafted for one, drafted in rows])
            ids, sampled = sample(scores, batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seeds, steps)
        failures = [failure or other for failure, other in zip(failures, wrong)]
        logprob, lse = token_logprob(logits, ids)
        logprobs = logprob.tolist()
        sampling = [0.0] * len(sequences) if sampled is None else sampled.tolist()
        errors = [
            failure or _error(one.params, value, other)
            for one, value, other, failure in zip(sequences, logprobs, sampling, failures)
        ]
        tops = [
            None if one.params.logprobs is None or not top else top_logprobs(logits[row], lse[row], one.params.logprobs)
            for row, one in enumerate(sequences)
        ]
        return Samples(ids.tolist(), logprobs, sampling, tops, errors)

    def read(
        self,
        result: Tensor,
        logits: Tensor,
        rows: abc.Sequence[int],
        sequences: abc.Sequence[Sequence],
        drafts: abc.Sequence[int],
        others: abc.Container[int],
    ) -> list[SampledRow]:
        """What ``sample`` would return of some rows of a step that sampled; those that need the host are sampled here.

        Args:
            result: [R, 4] of the step, see ``StepSampling``.
            logits: [R, V] of the step.
            rows: of both that are asked for.
            sequences: of each row.
            drafts: of each row.
            others: indices of ``rows`` that the step sampled of another sequence.
        """
        host = [at for at, one in enumerate(sequences) if at in others or one.request.needs_host]
        of_host: abc.Iterator[SampledRow] = iter(())
        if host:
            given = logits[[rows[at] for at in host]], [sequences[at] for at in host], [drafts[at] for at in host]
            of_host = self.sample(*given).rows()
        whole, waiting = result.tolist(), set(host)
        found = []
        for at, (row, one) in enumerate(zip(rows, sequences)):
            if at in waiting:
                found.append(next(of_host))
                continue
            token, logprob, sampling, lse = whole[row]
            top = None
            if one.params.logprobs is not None:
                own = upcast(logits[row])
                top = top_logprobs(own, torch.tensor(lse, dtype=own.dtype, device=own.device), one.params.logprobs)
            found.append((int(token), logprob, sampling, top, _error(one.params, logprob, sampling)))
        return found

    def _masked(
        self, own: Tensor, scores: Tensor, sequences: abc.Sequence[Sequence], drafts: abc.Sequence[int]
    ) -> tuple[Tensor, list[str | None]]:
        """``scores`` without what the sequences' grammars forbid, and what went wrong with each row."""
        rows = [(one.matcher, drafted) for one, drafted in zip(sequences, drafts)]
        if all(matcher is None for matcher, _ in rows):
            return scores, [None] * len(rows)
        if self._masks is None:
            self._masks = GrammarMasks(own.shape[-1], own.device)
        return self._masks.apply(own, scores, rows)


_FORBID = ("structured_outputs", "allowed_token_ids", "bad_words", "logits_processors")
"""Parameters that leave tokens out."""


def _error(params: SamplingParams, logprob: float, sampling_logprob: float) -> str | None:
    if math.isfinite(logprob) and math.isfinite(sampling_logprob):
        return None
    given = [name for name in _FORBID if getattr(params, name)]
    if math.isfinite(logprob) and given:  # the model's own logits are finite
        return f"{' and '.join(given)} leave no token to sample."
    return "the model's logits are not finite, or leave no token to sample."
