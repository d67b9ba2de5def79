"""What ``LLM`` returns: the fields that vLLM's outputs have."""

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from toolkit.engine import Completion
from toolkit.engine.prompt_logprobs import ranked


@dataclass(frozen=True)
class Logprob:
    """One token at one place.

    Args:
        logprob: natural log, under the model's own distribution.
        rank: 1 for the most probable token; None for a sampled one that is not among the tokens asked for.
        decoded_token: its text; None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt.

    Args:
        index: which of the prompt's ``n``.
        text: without stop strings and stop tokens.
        token_ids: as generated.
        cumulative_logprob: the sum of the tokens' log-probabilities.
        logprobs: at each place the tokens that ``SamplingParams.logprobs`` asked for, the sampled one among them; None
            where it asked for none.
        finish_reason: "stop", "length", "cancelled", "timeout" or "error".
        stop_reason: the stop string or stop token id; None for the end-of-text token and for other reasons.
        error: the message, with "error".
        sampling_logprobs: of each token, under the distribution that it was sampled from: after penalties, masks of
            ``structured_outputs``, temperature and filters (0 for greedy).
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str
    stop_reason: str | int | None = None
    error: str | None = None
    sampling_logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class RequestOutput:
    """All completions of one prompt.

    Args:
        request_id: counted by the ``LLM``.
        prompt: the text; None of token ids.
        prompt_token_ids: its tokens.
        outputs: ``n`` of them.
        finished: True.
        prompt_logprobs: at each token of the prompt those that ``SamplingParams.prompt_logprobs`` asked for, the
            prompt's among them; None at the first, and where it asked for none.
        num_cached_tokens: of the prompt, found in the prefix cache; None where it was not let in.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int | None = None


@dataclass(frozen=True)
class EmbeddingOutput:
    """embedding: [D] numbers; of every token with pooling type ALL, [n][D]."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Dimensions."""
        return len(self.embedding)


@dataclass(frozen=True)
class ClassificationOutput:
    """probs: one for each class."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """Classes."""
        return len(self.probs)


@dataclass(frozen=True)
class ScoringOutput:
    """score: of a pair of texts."""

    score: float


@dataclass(frozen=True)
class PoolingOutput:
    """data: what the task gives: an embedding, one for each token, scores or logits."""

    data: Tensor


Output = TypeVar("Output")


@dataclass(frozen=True)
class _Pooled(Generic[Output]):
    """The result of one prompt.

    Args:
        request_id: counted by the ``LLM``.
        prompt: the text; None of token ids and of pairs.
        prompt_token_ids: its tokens.
        outputs: the result.
        finished: True.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: Output
    finished: bool = True


class EmbeddingRequestOutput(_Pooled[EmbeddingOutput]):
    """``outputs.embedding``."""


class ClassificationRequestOutput(_Pooled[ClassificationOutput]):
    """``outputs.probs``."""


class ScoringRequestOutput(_Pooled[ScoringOutput]):
    """``outputs.score``."""


class PoolingRequestOutput(_Pooled[PoolingOutput]):
    """``outputs.data``."""


def completion_output(completion: Completion, tokenizer: Any) -> CompletionOutput:
    """A completion of the engine."""
    tops = completion.top_logprobs
    return CompletionOutput(
        index=completion.index,
        text=completion.text,
        token_ids=completion.token_ids,
        cumulative_logprob=sum(completion.logprobs),
        logprobs=None
        if tops is None
        else [_logprobs(*one, tokenizer) for one in zip(completion.token_ids, completion.logprobs, tops)],
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        error=completion.error,
        sampling_logprobs=completion.sampling_logprobs,
    )


def prompt_logprobs(
    completion: Completion, count: int | None, tokenizer: Any
) -> list[dict[int, Logprob] | None] | None:
    """``RequestOutput.prompt_logprobs`` of a completion of its prompt, with the ``count`` most probable tokens each."""
    if completion.prompt_logprobs is None or completion.prompt_ranks is None or count is None:
        return None
    return [
        None
        if values is None
        else {token: Logprob(value, rank, _text(token, tokenizer)) for token, value, rank in ranked(values, count, own)}
        for values, own in zip(completion.prompt_logprobs, completion.prompt_ranks, strict=True)
    ]


def _logprobs(token: int, own: float, top: dict[int, float], tokenizer: Any) -> dict[int, Logprob]:
    """The most probable tokens in a place of the output, and the one that was sampled."""
    found = {one: Logprob(value, rank, _text(one, tokenizer)) for rank, (one, value) in enumerate(top.items(), 1)}
    return found if token in found else {token: Logprob(own, None, _text(token, tokenizer)), **found}


def _text(token: int, tokenizer: Any) -> str | None:
    return None if tokenizer is None else str(tokenizer.decode([token]))
