"""A request and its sequences: what was asked, and how far each completion is."""

import math
from collections import deque
from dataclasses import replace
from functools import cached_property

from toolkit.engine.adjustments import Adjustments
from toolkit.engine.detokenizer import Decoder, Detokenizer
from toolkit.engine.grammar.compiler import CompiledGrammar
from toolkit.engine.media import PromptMedia
from toolkit.engine.outputs import Completion, Delta, FinishReason
from toolkit.engine.params import SamplingParams
from toolkit.engine.prediction import PredictedOutput
from toolkit.engine.prompt_logprobs import MOST_ROWS, PromptLogprobs
from toolkit.engine.swap import SwappedState
from toolkit.state import BlockTables, PrefixKey, WeightKeys


class Request:
    """One prompt and its ``params.num_candidates`` sequences.

    Args:
        request_id: a number that no other request of the engine has.
        prompt_index: which prompt of the call it is.
        prompt: token ids.
        params: how to sample.
        eos: tokens that end a text.
        max_tokens: most tokens of a completion.
        seed: of the samples, 64 bits.
        decoder: of the text; None for token ids only.
        sink: where deltas go; None for those that ``Engine.step`` returns.
        rotary_length: by which its rotary tables are made, see ``Completion``.
        media: the pictures of the prompt, or None.
        keeps_prompt: whether tokens behind the prompt see others than those in it.
        grammar: of its outputs, or None.
        adjustments: of its logits, or None.
    """

    def __init__(
        self,
        request_id: int,
        prompt_index: int,
        prompt: list[int],
        params: SamplingParams,
        *,
        eos: frozenset[int],
        max_tokens: int,
        seed: int,
        decoder: Decoder | None,
        sink: deque[Delta] | None,
        rotary_length: int | None = None,
        media: PromptMedia | None = None,
        keeps_prompt: bool = False,
        grammar: CompiledGrammar | None = None,
        adjustments: Adjustments | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_index = prompt_index
        self.prompt = prompt
        self.params = params
        self.stop_ids = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else eos)
        self.eos = eos
        self.max_tokens = max_tokens
        self.seed = seed
        self.decoder = decoder
        self.sink = sink
        self.rotary_length = rotary_length
        self.media = media
        self.prompt_length = len(prompt) if keeps_prompt else None
        self.grammar = grammar
        self.adjustments = adjustments
        self.prompt_logprobs: PromptLogprobs | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = PromptLogprobs(prompt, params.prompt_logprobs)
        self.num_cached_tokens: int | None = None
        self.scheduled_time: float | None = None
        self.prefilled = False  # whether the prompt is computed, so that other sequences may fork it
        self.sequences = [Sequence(self, index) for index in range(params.num_candidates)]

    @cached_property
    def needs_host(self) -> bool:
        """Whether the host must see its logits.

        For processors, DRY, ``typical_p`` and XTC; and a grammar, whose masks are filled while the model runs.
        """
        adjustments, params = self.adjustments, self.params
        if params.dry_multiplier > 0 or params.cuts_tails:
            return True
        return self.grammar is not None or (adjustments is not None and bool(adjustments.processors))

    @cached_property
    def needs_tokens(self) -> bool:
        """Whether the host must know a token of it before the one behind that can be sampled.

        Where the host must see logits; for penalties and bad words, which go by the tokens so far; and for a
        prediction, which is followed token by token.
        """
        adjustments, params = self.adjustments, self.params
        if self.needs_host or params.penalised or params.predicted_token_ids is not None:
            return True
        return adjustments is not None and adjustments.has_bad_words

    @property
    def finished(self) -> bool:
        """Whether every completion is finished."""
        return all(sequence.completion is not None for sequence in self.sequences)

    @property
    def completions(self) -> list[Completion]:
        """The finished completions in order; of ``best_of`` candidates the best, numbered anew."""
        finished = [sequence.completion for sequence in self.sequences if sequence.completion is not None]
        if not self.params.chooses:
            return finished
        best = sorted(finished, key=_mean_logprob, reverse=True)[: self.params.n]
        return [replace(completion, index=index) for index, completion in enumerate(best)]


def _mean_logprob(completion: Completion) -> float:
    """Under the model's own distribution; of one that failed, or has no tokens, the lowest."""
    if completion.finish_reason == "error" or not completion.logprobs:
        return -math.inf
    return math.fsum(completion.logprobs) / len(completion.logprobs)


def completion_seed(seed: int, index: int) -> int:
    """The seed of one of a request's completions, as an int64: the request's own for the first, others for the rest."""
    word = (seed + index * 0x9E3779B97F4A7C15) % 2**64  # an odd step: it meets every 64-bit word once
    return word - 2**64 if word >= 2**63 else word


class Sequence:
    """One completion as it grows.

    Attributes:
        seed: fixes the next sample, together with the number of tokens so far.
        tokens: prompt and output.
        names: what stands for each of them in the prefix index: themselves, or the rows of pictures.
        block_tables: its blocks while it runs; None while it waits.
        swapped: its state, where that is swapped out.
        table_stamp: of the row of the runner's block tables that holds its blocks; 0 for none.
        num_known_blocks: how many entries of that row are its blocks.
        draft: tokens that may come next, which the next step verifies.
        matcher: how far the output is within the request's grammar; None without one.
        prediction: how far the output follows the request's prediction; None without one.
    """

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.index = index
        self.params = request.params
        self.order = (request.params.priority, request.request_id, index)
        self.seed = completion_seed(request.seed, index)
        self.prompt_length = len(request.prompt)
        self.tokens = request.prompt.copy()
        self.names = self.tokens if request.media is None else request.media.names.copy()
        self.block_tables: BlockTables | None = None
        self.swapped: SwappedState | None = None
        self.table_stamp = 0
        self.num_known_blocks = 0
        self.draft: list[int] = []
        self.matcher = None if request.grammar is None else request.grammar.matcher(request.stop_ids)
        self.prediction: PredictedOutput | None = None
        if self.params.predicted_token_ids is not None:
            self.prediction = PredictedOutput(self.params.predicted_token_ids)
        self.logprobs: list[float] = []
        self.sampling_logprobs: list[float] = []
        self.top_logprobs: list[dict[int, float]] | None = [] if self.params.logprobs is not None else None
        self.versions: list[int] = []
        self.text_offset: list[int] = []
        self.completion: Completion | None = None
        self._text: Detokenizer | None = None
        if request.decoder is not None:
            stop = tuple(self.params.stop or ())
            self._text = Detokenizer(request.decoder, request.prompt, stop, self.params.include_stop_str_in_output)

    @property
    def generated(self) -> int:
        """Tokens of output."""
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Tokens whose state is not computed; 1 while decoding. The sequence must be running."""
        assert self.block_tables is not None
        return len(self.tokens) - self.block_tables.length

    def chunk(self, count: int) -> int:
        """How many of its next ``count`` tokens run in one step.

        Fewer where tokens that see each other are cut, and where the logits of all would be too many.
        """
        media, scored = self.request.media, self.request.prompt_logprobs
        if media is None or self.block_tables is None:
            return count if scored is None or scored.complete else min(count, MOST_ROWS)
        return media.chunk(self.block_tables.length, count)

    def may_continue(self, length: int) -> bool:
        """Whether state of the first ``length`` tokens can be taken from another sequence.

        They end inside no block, and the logits behind them are not wanted.
        """
        media, scored = self.request.media, self.request.prompt_logprobs
        whole = media is None or media.block_around(length) is None
        return whole and (scored is None or scored.may_continue(length))

    @property
    def prompt_logprobs(self) -> list[dict[int, float] | None] | None:
        """Of the prompt's tokens, where they are asked for and computed."""
        scored = self.request.prompt_logprobs
        return None if scored is None or not scored.complete else scored.found

    @property
    def prompt_ranks(self) -> list[int | None] | None:
        """Of the same tokens."""
        scored = self.request.prompt_logprobs
        return None if scored is None or not scored.complete else scored.ranks

    def penalised(self, drafted: int = 0) -> bool:
        """Whether penalties or ``min_tokens`` change the logits of the next token, or of the one behind a draft."""
        return self.params.penalised or self.generated + drafted < self.params.min_tokens

    def prefix_key(self, weights: WeightKeys) -> PrefixKey:
        """The key of its state: of the weights, and its own cache salt, rotary length and prompt's length."""
        key = weights.of(self.params.lora_name)
        salt, rotary, prompt = self.params.cache_salt, self.request.rotary_length, self.request.prompt_length
        if salt is None and rotary is None and prompt is None:
            return key
        return key._replace(salt=salt, rotary=rotary, prompt=prompt)

    def accept(
        self, token: int, logprob: float, sampling_logprob: float, top: dict[int, float] | None, version: int
    ) -> Delta:
        """Add a sampled token; the delta that it makes, with the completion if it is the last."""
        params, request = self.params, self.request
        if self.matcher is not None and token not in request.stop_ids:
            self.matcher.accept(token)
        self.tokens.append(token)
        if self.names is not self.tokens:
            self.names.append(token)
        if self.prediction is not None:
            self.prediction.follow(token)
        self.logprobs.append(logprob)
        self.sampling_logprobs.append(sampling_logprob)
        self.versions.append(version)
        self.text_offset.append(0 if self._text is None else len(self._text.text))
        if self.top_logprobs is not None and top is not None:
            self.top_logprobs.append(top)
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if token in request.stop_ids:
            reason, stop_reason = "stop", None if token in request.eos else token
        if self._text is not None and (reason is None or params.include_stop_str_in_output):
            found = self._text.push(token, self.generated > params.min_tokens or not params.min_tokens)
            if found is not None and reason is None:
                reason, stop_reason = "stop", found
        if reason is None and self.generated >= request.max_tokens:
            reason = "length"
        tops = [top] if top is not None else None
        if reason is not None:
            return self.finish(reason, stop_reason, [token], [logprob], tops)
        text = self._text.take() if self._text is not None else ""
        return Delta(
            request.request_id,
            request.prompt_index,
            self.index,
            [token],
            [logprob],
            text,
            tops,
            text_offset=self.text_offset[-1:],
            prompt_logprobs=self.prompt_logprobs if self.generated == 1 else None,
            weight_version=version,
            sampling_logprobs=[sampling_logprob],
        )

    def finish(
        self,
        reason: FinishReason,
        stop_reason: str | int | None = None,
        token_ids: list[int] | None = None,
        logprobs: list[float] | None = None,
        top_logprobs: list[dict[int, float]] | None = None,
        error: str | None = None,
    ) -> Delta:
        """End the completion; the delta with it, and with the new tokens given."""
        request, text, last = self.request, "", ""
        if self._text is not None:
            if reason != "error":  # what went wrong may be the text itself
                self._text.finish()
                last = self._text.take()
            text = self._text.text
        self.completion = Completion(
            request_id=request.request_id,
            prompt_index=request.prompt_index,
            index=self.index,
            prompt_token_ids=request.prompt,
            token_ids=self.tokens[self.prompt_length :],
            logprobs=self.logprobs,
            sampling_logprobs=self.sampling_logprobs,
            text=text,
            finish_reason=reason,
            stop_reason=stop_reason,
            weight_versions=self.versions,
            top_logprobs=self.top_logprobs,
            text_offset=[min(offset, len(text)) for offset in self.text_offset],
            error=error,
            rotary_length=request.rotary_length,
            prompt_logprobs=self.prompt_logprobs,
            prompt_ranks=self.prompt_ranks,
            accepted_prediction_tokens=None if self.prediction is None else self.prediction.num_accepted,
            rejected_prediction_tokens=None if self.prediction is None else self.prediction.num_rejected,
            num_cached_tokens=request.num_cached_tokens,
            scheduled_time=request.scheduled_time,
        )
        return Delta(
            request.request_id,
            request.prompt_index,
            self.index,
            token_ids or [],
            logprobs or [],
            last,
            top_logprobs,
            self.completion,
            self.text_offset[-len(token_ids) :] if token_ids else [],
            self.prompt_logprobs if self.generated == len(token_ids or ()) else None,
            self.completion.weight_version,
            self.sampling_logprobs[-len(token_ids) :] if token_ids else [],
        )
