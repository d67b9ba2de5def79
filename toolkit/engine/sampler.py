"""Logits to tokens: penalties, temperature, top-k, top-p, min-p, and one draw by inverse CDF.

A row's token depends on that row's logits and its own sequence only, bit for bit, whatever the batch: work on
whole rows goes through kernels that treat each row alone (softmax, cumsum, topk), everything else is IEEE
arithmetic that has one answer. Shapes: B rows, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Sequence as Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.engine.order import first_largest, largest
from toolkit.engine.params import SamplingParams
from toolkit.engine.request import Sequence
from toolkit.ops.token_logprob import token_logprob

NUCLEUS_GUESS = 256
"""Tokens that a nucleus is first looked for in; the whole vocabulary is sorted only if that is too few."""


@dataclass(slots=True)
class Samples:
    """One entry a row: the token, its log-probability by the model and by the distribution drawn from, the
    likeliest tokens when asked for, and what went wrong with the row, if anything.
    """

    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    top_logprobs: list[dict[int, float] | None]
    errors: list[str | None]


class Workspace:
    """Two float64 buffers that steps reuse: fresh memory of that size costs more than the arithmetic."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def take(self, rows: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two [rows, vocabulary] tensors of undefined contents, valid until the next call."""
        if self._buffer.dim() != 3 or rows > self._buffer.shape[1] or vocabulary != self._buffer.shape[2]:
            self._buffer = torch.empty(2, rows, vocabulary, dtype=torch.float64, device=device)
        return self._buffer[0, :rows], self._buffer[1, :rows]


def sample(logits: Tensor, sequences: Collection[Sequence], workspace: Workspace | None = None) -> Samples:
    """Draw the next token of each sequence from its row of ``logits`` [B, V] (the model's own)."""
    logits = logits.float()
    rows = len(sequences)
    drawn = [at for at, one in enumerate(sequences) if one.adjusted or not one.params.greedy]
    errors: list[str | None] = [None] * rows
    sampling = [0.0] * rows
    if not drawn:
        ids = first_largest(logits)
    else:
        workspace = workspace or Workspace()
        scores, buffer = workspace.take(len(drawn), logits.shape[-1], logits.device)
        scores.copy_(logits if len(drawn) == rows else logits[drawn])
        for at, row in enumerate(drawn):
            if sequences[row].adjusted:
                try:
                    adjust(scores[at], sequences[row])
                except Exception as error:
                    errors[row] = f"{type(error).__name__}: {error}"
        owners = [sequences[row] for row in drawn]
        uniforms = [0.0 if one.params.greedy else one.random.random() for one in owners]
        chosen, chosen_logprobs = draw(scores, [one.params for one in owners], uniforms, buffer)
        if len(drawn) == rows:
            ids, sampling = chosen, chosen_logprobs
        else:
            ids = first_largest(logits)
            ids[drawn] = chosen
            for row, value in zip(drawn, chosen_logprobs):
                sampling[row] = value
    logprob, lse = token_logprob(logits, ids)
    logprobs = logprob.tolist()
    for row, (value, other) in enumerate(zip(logprobs, sampling)):
        if errors[row] is None and not (math.isfinite(value) and math.isfinite(other)):
            errors[row] = "the model's logits are not finite, or leave no token to draw."
    tops = [
        None if one.params.logprobs is None else likeliest(logits[row], lse[row], one.params.logprobs)
        for row, one in enumerate(sequences)
    ]
    return Samples(ids.tolist(), logprobs, sampling, tops, errors)


def adjust(scores: Tensor, sequence: Sequence) -> None:
    """Apply penalties, and bar the ending tokens before ``min_tokens``, in place on one row [V]."""
    params = sequence.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list(set(sequence.tokens)), device=scores.device)
        old = scores[seen]
        penalty = params.repetition_penalty
        scores[seen] = torch.where(old > 0, old / penalty, old * penalty)
    output = Counter(sequence.tokens[sequence.prompt_length :])
    if output and (params.frequency_penalty or params.presence_penalty):
        seen = torch.tensor(list(output), device=scores.device)
        counts = torch.tensor(list(output.values()), device=scores.device, dtype=scores.dtype)
        scores[seen] -= params.frequency_penalty * counts + params.presence_penalty
    if sequence.generated < params.min_tokens and sequence.request.stop_ids:
        barred = [token for token in sequence.request.stop_ids if token < len(scores)]
        scores[barred] = -math.inf


def draw(
    scores: Tensor,
    params: Collection[SamplingParams],
    uniforms: Collection[float],
    buffer: Tensor | None = None,
) -> tuple[Tensor, list[float]]:
    """Token ids [B] and their log-probabilities under the processed distribution of each row.

    scores: [B, V] float64 logits, overwritten. uniforms: B multiples of 2**-53 in [0, 1). buffer: [B, V] float64
    to work in. The token is the first one whose cumulative probability, in order of ids, exceeds the uniform.
    Greedy rows take the lowest id among the largest scores, with log-probability 0. A row without a distribution
    (NaN, +inf, all -inf) gives NaN.
    """
    greedy = [row for row, one in enumerate(params) if one.greedy]
    if greedy:
        best_ids = first_largest(scores[greedy])
        best = scores[greedy, best_ids].tolist()
    probabilities = process(scores, params, buffer)
    cumulative = torch.cumsum(probabilities, -1, out=scores)
    total = cumulative[:, -1:]
    # A uniform is at most 1 - 2**-53, so the product never rounds up to the total, past the last token.
    target = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)[:, None] * total
    places = torch.searchsorted(cumulative, target, right=True).clamp_(max=scores.shape[-1] - 1)
    mass = (probabilities.gather(1, places) / total)[:, 0].tolist()
    logprobs = [math.log(one) if one > 0 else math.nan for one in mass]
    ids = places[:, 0]
    if greedy:
        ids[greedy] = best_ids
        for row, value in zip(greedy, best):
            logprobs[row] = 0.0 if math.isfinite(value) else math.nan
    return ids, logprobs


def process(scores: Tensor, params: Collection[SamplingParams], buffer: Tensor | None = None) -> Tensor:
    """Probabilities [B, V] after temperature, top-k, top-p and min-p, not renormalised after the last two.

    scores: [B, V] float64 logits, overwritten. buffer: [B, V] float64 for the result; None makes one.
    """
    vocabulary = scores.shape[-1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device)[:, None]

    if any(one.temperature != 1.0 for one in params):
        scores.div_(column([1.0 if one.greedy else one.temperature for one in params]))
    limits = [one.top_k if 0 < one.top_k < vocabulary else 0 for one in params]
    if most := max(limits):
        at = torch.tensor([max(limit, 1) - 1 for limit in limits], device=scores.device)[:, None]
        least = largest(scores, most).gather(1, at)
        off = column([-math.inf if not limit else math.inf for limit in limits])
        scores.masked_fill_(scores < torch.minimum(least, off), -math.inf)
    probabilities = torch.softmax(scores, -1, out=buffer)
    if any(one.top_p < 1.0 for one in params):
        outside = beyond_nucleus(probabilities, column([one.top_p for one in params]))
        probabilities.masked_fill_(outside, 0.0)
    if any(one.min_p > 0.0 for one in params):
        least = probabilities.amax(-1, keepdim=True) * column([one.min_p for one in params])
        probabilities.masked_fill_(probabilities < least, 0.0)
    return probabilities


def beyond_nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Mask [B, V] of all but the fewest likeliest tokens that reach ``top_p`` [B, 1].

    Of equals the lowest ids are in. Rows with a ``top_p`` of 1 keep everything.
    """
    vocabulary = probabilities.shape[-1]
    for width in (min(NUCLEUS_GUESS, vocabulary), vocabulary):
        likely = largest(probabilities, width)
        reached = likely.cumsum(-1)
        if width == vocabulary or bool(((reached[:, -1:] >= top_p) | (top_p >= 1.0)).all()):
            break
    # A token is in while the mass before it falls short.
    count = 1 + (reached[:, :-1] < top_p).sum(-1, keepdim=True)
    least = likely.gather(1, count - 1).masked_fill(top_p >= 1.0, 0.0)
    outside = probabilities < least
    surplus = vocabulary - outside.sum(-1, keepdim=True) - count
    if bool(((surplus > 0) & (top_p < 1.0)).any()):
        ties = probabilities == least
        room = ties.sum(-1, keepdim=True) - surplus
        outside |= ties & (ties.cumsum(-1) > room) & (top_p < 1.0)
    return outside


def likeliest(logits: Tensor, lse: Tensor, count: int) -> dict[int, float]:
    """The ``count`` likeliest tokens of one row [V] with their log-probabilities, best first."""
    values, ids = logits.topk(min(count, len(logits)))
    return dict(zip(ids.tolist(), (values - lse).tolist()))
