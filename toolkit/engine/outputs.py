"""What the engine hands back: a completion at the end, deltas on the way."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]


@dataclass(slots=True)
class Completion:
    """One finished continuation of one prompt.

    Args:
        request_id: of the request.
        prompt_index: index of the prompt in the call.
        index: which of the prompt's ``n`` completions.
        prompt_token_ids: the prompt.
        token_ids: as generated, with the token that ended it.
        logprobs: one per generated token, natural log, under the model's own distribution (full vocabulary, before
            penalties and temperature); float32 values, of a float64 model on a CPU float64.
        sampling_logprobs: one per token, under the distribution that it was sampled from (0 for greedy).
        text: without stop strings and stop tokens, unless asked for; "" without a tokenizer.
        finish_reason: "stop" (end of text, stop token or stop string), "length", "cancelled", "timeout" (it has what
            was generated until then) or "error".
        stop_reason: the stop string or stop token id; None for the end-of-text token and for other reasons.
        weight_versions: one per token, of the weights that it was sampled under.
        top_logprobs: the most probable tokens at each step under the model's own distribution, best first, when
            ``SamplingParams.logprobs`` asked for them.
        text_offset: one per token, where in ``text`` its characters begin: the text's length before it. Those of tokens
            whose text was cut with a stop string are the text's length.
        error: the message, with "error".
        routed_experts: [tokens, L, K] int32 on the CPU, where the engine returns routed experts: the experts of each
            token of prompt and completion in each of the L layers of experts, best first. The last token, which the
            engine never ran, has none. None for what ended while it waited.
        selected_keys: [tokens, L, K] int32 on the CPU, where the engine returns selected keys: the positions that each
            token attended in each of the L layers with an indexer, ascending, -1 behind the last one. K is the keys
            that an indexer selects, or the engine's max_model_len where that is less. The last token has none.
        rotary_length: the shortest sequence length with the rotary tables that it was computed by, which are those of
            the declared length (prompt + max_tokens); ``token_logprobs(rotary_lengths=...)`` trains by them. None for
            a model whose tables do not depend on the length.
        prompt_logprobs: for each token of the prompt the most probable ones in its place under the model's own
            distribution, best first, and before them the token where it is not among them; when
            ``SamplingParams.prompt_logprobs`` asked for them. None for the first token, and of a prompt that was not
            computed to its end.
        prompt_ranks: with ``prompt_logprobs``, for each token of the prompt its rank among all in its place, 1 for the
            most probable. None for the first token.
        accepted_prediction_tokens, rejected_prediction_tokens: tokens of ``SamplingParams.predicted_token_ids`` that
            the completion has, followed from its beginning and found again where it leaves them, and those that it does
            not have; with or without speculation. None without a prediction.
        num_cached_tokens: of the prompt, whose state was found in the prefix cache when it was first let in. None for
            what ended while it waited.
        scheduled_time: ``time.perf_counter()`` when its request was first let in.
    """

    request_id: int
    prompt_index: int
    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    weight_versions: list[int] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] | None = None
    text_offset: list[int] = field(default_factory=list)
    error: str | None = None
    routed_experts: Tensor | None = field(default=None, compare=False)
    selected_keys: Tensor | None = field(default=None, compare=False)
    rotary_length: int | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    prompt_ranks: list[int | None] | None = None
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None
    num_cached_tokens: int | None = field(default=None, compare=False)
    scheduled_time: float | None = field(default=None, compare=False)

    @property
    def weight_version(self) -> int | None:
        """Of the last token; None when there is none."""
        return self.weight_versions[-1] if self.weight_versions else None


@dataclass(slots=True)
class Delta:
    """What one step added to one completion.

    Args:
        request_id: of the request.
        prompt_index: index of the prompt in the call.
        index: which of the prompt's ``n`` completions.
        token_ids: new tokens.
        logprobs: theirs, as in ``Completion``.
        text: new text; never half a character, never a part of a stop string that may still be cut, so it can be
            empty or cover several tokens.
        top_logprobs: of the new tokens, as in ``Completion``.
        finished: the whole completion, at its end.
        text_offset: of the new tokens, as in ``Completion``, before anything is cut.
        prompt_logprobs: in the first delta of the completion, as in ``Completion``.
        weight_version: of the last token, new or not; None before the first one.
        sampling_logprobs: of the new tokens, as in ``Completion``.
    """

    request_id: int
    prompt_index: int
    index: int
    token_ids: list[int]
    logprobs: list[float]
    text: str
    top_logprobs: list[dict[int, float]] | None = None
    finished: Completion | None = None
    text_offset: list[int] = field(default_factory=list)
    prompt_logprobs: list[dict[int, float] | None] | None = None
    weight_version: int | None = None
    sampling_logprobs: list[float] = field(default_factory=list)


def whole(completion: Completion) -> Delta:
    """A completion as one delta."""
    return Delta(
        completion.request_id,
        completion.prompt_index,
        completion.index,
        completion.token_ids,
        completion.logprobs,
        completion.text,
        completion.top_logprobs,
        completion,
        completion.text_offset,
        completion.prompt_logprobs,
        completion.weight_version,
        completion.sampling_logprobs,
    )


def joined(deltas: list[Delta]) -> Delta:
    """What several deltas of one completion, in order, add to it together."""
    first, *others = deltas
    for other in others:
        first.token_ids += other.token_ids
        first.logprobs += other.logprobs
        first.sampling_logprobs += other.sampling_logprobs
        first.text += other.text
        first.text_offset += other.text_offset
        if first.top_logprobs is not None:
            first.top_logprobs += other.top_logprobs or []
        first.finished, first.weight_version = other.finished, other.weight_version
    return first
