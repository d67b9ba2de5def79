"""``model.generate`` of a patched model on the engine: transformers reads the arguments, the engine samples the tokens.

    toolkit.patch(model)
    with route_generate(model):
        model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), max_new_tokens=64)

It uses ``custom_generate``: transformers merges configurations, expands inputs, makes its processors and criteria, and
calls a function of ours in the place of its loop.
"""

import contextlib
import copy
import inspect
import threading
from typing import Any, cast

import torch
from torch import Tensor, nn

from infer_patches.generation_config import CACHES, SAMPLING, check_supported, sampling_params
from infer_patches.route import Route
from toolkit import AsyncEngine, Engine
from toolkit.engine import EngineUnavailable
from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.patching import choose_rotary_lengths, ragged_forward
from toolkit.patching.eval_mode import eval_mode
from toolkit.state import RaggedBatch

_INPUTS = ("inputs", "input_ids", "attention_mask", "generation_config", "stopping_criteria", "streamer", "tokenizer")
_SUPPORTED = SAMPLING | {
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "max_time",
    "stop_strings",
    "num_return_sequences",
    "eos_token_id",
    "pad_token_id",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
}


class GenerateRoute(Route):
    """Routes ``model.generate`` to ``engine``."""

    def __init__(
        self, model: nn.Module, engine: Engine | AsyncEngine | None, fallback: bool, engine_args: dict[str, Any]
    ) -> None:
        super().__init__(model, generate)
        self.fallback = fallback
        self._given, self._engine_args = engine, engine_args
        self._owned: AsyncEngine | None = None
        self._renewing = threading.Lock()
        try:
            if engine is None:
                self._owned = AsyncEngine(Engine(model, **engine_args))
        except BaseException:
            super().undo()
            raise

    @property
    def engine(self) -> Engine | AsyncEngine:
        """The one given or made here; the latter anew after an error in a step, which fails the calls of that time."""
        with self._renewing:
            model = self._model()
            if self._owned is not None and self._owned.failure is not None and model is not None:
                with contextlib.suppress(Exception):  # what a failed step has left half done is not to be built upon
                    self._owned.shutdown()
                self._owned = AsyncEngine(Engine(model, **self._engine_args))
            return cast("Engine | AsyncEngine", self._given or self._owned)

    def undo(self) -> None:
        super().undo()
        if self._owned is not None:
            self._owned.shutdown()


def route_generate(
    model: nn.Module, engine: Engine | AsyncEngine | None = None, fallback: bool = False, **engine_args: Any
) -> GenerateRoute:
    """Let ``model.generate`` of a patched causal LM run on the engine, until ``undo()`` of the result.

    ``generate`` takes input_ids and attention_mask (padded left or right); GenerationConfig, keyword arguments, both:
    max_new_tokens, max_length, min_new_tokens, min_length, do_sample, temperature, top_k, top_p, min_p,
    repetition_penalty, num_return_sequences, eos_token_id, pad_token_id, stop_strings with tokenizer, max_time,
    return_dict_in_generate, output_scores, output_logits; streamer and stopping_criteria. Others raise an error that
    names them. It returns what transformers returns: ids [B * num_return_sequences, longest] int64, with ended rows
    padded on the right.

    What differs from transformers: sampled tokens are of the same distribution, by seeds that come from torch's global
    generator, so that ``torch.manual_seed`` repeats them, but not the ones that transformers would sample. Prompts
    padded on the right continue as they would without padding (transformers warns and continues from the padding).
    stopping_criteria see one row [1, length] at a time, and no scores. Scores and logits are those of one more forward
    over the finished rows; in bitwise mode they are those that tokens were sampled from. ``past_key_values`` is None.

    Args:
        model: the model.
        engine: one of this model's, which is left open. An ``AsyncEngine`` lets several threads generate at once; an
            ``Engine`` runs on the thread that generates, one at a time. None makes an ``AsyncEngine``.
        fallback: hand calls that the engine does not support to transformers' own generate instead of raising.
        engine_args: keyword arguments of ``toolkit.Engine`` for the engine that is made.

    Raises:
        ToolkitError: for a model that is not patched or is routed already, and for bad arguments of the engine.
    """
    if engine is not None and engine_args:
        raise ToolkitError(f"{', '.join(engine_args)} must be left out where engine is given; give one of the two.")
    return GenerateRoute(model, engine, fallback, engine_args)


def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of a routed model; a copy of such a model, which has no engine, runs transformers' own."""
    route = GenerateRoute.of.get(self)
    if route is None:
        return type(self).generate(self, *args, **kwargs)
    own, loop = route.own(self, "generate"), _Loop(route.engine)
    try:
        return own(**_accepted(self, args, kwargs, loop), custom_generate=loop)
    except ToolkitError as error:
        if not route.fallback or loop.started or isinstance(error, EngineUnavailable):
            raise
        return own(*args, **kwargs)


def _accepted(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], loop: "_Loop") -> dict[str, Any]:
    """The arguments of a call by name, less those that ``loop`` keeps; a ToolkitError for what is not taken."""
    from transformers import GenerationConfig
    from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

    signature = inspect.signature(type(model).generate)
    given = dict(signature.bind(model, *args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    del given[next(iter(signature.parameters))]
    known = vars(GenerationConfig())
    for name, value in given.items():
        nothing = value is None or (isinstance(value, bool | list) and not value)
        if name not in _INPUTS and name not in known and not nothing:
            raise ToolkitError(must_be_one_of("an argument of generate", name, (*_INPUTS, *sorted(_SUPPORTED))))
    loop.streamer, tokenizer = given.pop("streamer", None), given.pop("tokenizer", None)
    config = given.get("generation_config")

    def sources(name: str) -> list[Any]:
        """What the call, its configuration and the model's say of a field, the first of which counts."""
        return [given.get(name), getattr(config, name, None), getattr(model.generation_config, name, None)]

    asked, *configured = sources("cache_implementation")
    if asked not in (None, "dynamic"):
        raise ToolkitError(f"cache_implementation must be None or 'dynamic' on the engine, got {asked!r}.")
    if next((one for one in configured if one is not None), None) in CACHES:
        given["cache_implementation"] = "dynamic"  # transformers would allocate a static one before it calls the loop
    all_strings = sources("stop_strings")
    strings = next((one for one in all_strings if one is not None), None)
    if strings is not None:
        # transformers gives no tokenizer to a custom loop, so the criterion is made here.
        if tokenizer is None:
            raise ToolkitError(f"tokenizer must be given with stop_strings {strings!r}, got None.")
        criteria = [*(given.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, strings)]
        given["stopping_criteria"] = StoppingCriteriaList(criteria)
        if config is not None:
            given["generation_config"] = copy.copy(config)
            given["generation_config"].stop_strings = None
        if all_strings[0] is not None or all_strings[2] is not None:
            given["stop_strings"] = None
    return given


class _Loop:
    """The decoding loop of one call: what transformers calls once inputs, configuration and criteria are prepared.

    started: whether tokens are being sampled, after which there is no falling back.
    """

    def __init__(self, engine: Engine | AsyncEngine) -> None:
        self.engine = engine
        self.streamer: Any = None
        self.started = False

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_inputs: Any,
    ) -> Any:
        from transformers.generation.stopping_criteria import StoppingCriteriaList
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        config = generation_config
        check_supported(config, _SUPPORTED)
        rows, length = input_ids.shape
        ends, others = _split(stopping_criteria)
        pad = next((one for one in (config.pad_token_id, *ends) if one is not None), None)
        max_tokens = stopping_criteria.max_length - length
        prompts = _prompts(input_ids, model_inputs.get("attention_mask"))
        # A request's completions can be ended only together: with criteria each is a separate request.
        count = 1 if others else config.num_return_sequences
        least = max(config.min_length - length, config.min_new_tokens or 0, 0)
        common: dict[str, Any] = {"n": count, "min_tokens": min(least, max_tokens)}
        params = [
            sampling_params(config, ends, max_tokens, seed=_seed() if config.do_sample else 0, **common)
            for _ in range(rows // count)
        ]
        deltas = self.engine.stream(prompts[::count], params)
        self.started = True
        columns = _Columns(input_ids, pad, self.streamer)
        criteria = StoppingCriteriaList(others)
        for delta in deltas:
            row, finished = delta.prompt_index * count + delta.index, delta.finished
            if finished is not None and finished.error is not None:
                raise ToolkitError(f"row {row} of input_ids could not be continued: {finished.error}")
            columns.add(row, delta.token_ids, finished is not None)
            if finished is not None:
                columns.rotary_lengths[row] = finished.rotary_length
            if others and finished is None and bool(criteria(columns.row(row), None).all()):
                columns.add(row, [], True)
                self.engine.cancel(delta.request_id)
        sequences = columns.finish()
        if not config.return_dict_in_generate:
            return sequences
        logits = scores = None
        if config.output_logits or config.output_scores:
            logits = _logits(model, prompts, sequences[:, length:], columns.rotary_lengths)
        if config.output_scores:
            scores = tuple(
                logits_processor(sequences[:, : length + at], one.clone()) for at, one in enumerate(logits or ())
            )
        wanted: Any = logits if config.output_logits else None
        return GenerateDecoderOnlyOutput(cast(torch.LongTensor, sequences), scores=scores, logits=wanted)


def _seed() -> int:
    """Of one request, from torch's global generator."""
    return int(torch.randint(2**63 - 1, ()))


def _split(stopping_criteria: Any) -> tuple[list[int], list[Any]]:
    """The tokens that end a row, and the criteria that the engine does not know itself."""
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    ends: list[int] = []
    others = []
    for one in stopping_criteria:
        if isinstance(one, EosTokenCriteria):
            ends += one.eos_token_id.tolist()
        elif not isinstance(one, MaxLengthCriteria):
            others.append(one)
    return ends, others


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The tokens of each row [B, length] that its mask has not taken out as padding."""
    if attention_mask is None:
        return input_ids.tolist()
    kept = attention_mask.to(input_ids.device) != 0
    starts = kept[:, 0].long() + (kept[:, 1:] & ~kept[:, :-1]).sum(1)
    for row, runs in enumerate(starts.tolist()):
        if runs != 1:
            what = "holes" if runs else "no token"
            raise ToolkitError(f"attention_mask must be padding on the left or right, got {what} in row {row}.")
    return [ids[mask].tolist() for ids, mask in zip(input_ids, kept, strict=True)]


class _Columns:
    """Rows that grow one by one and leave, as transformers' do, column by column."""

    def __init__(self, input_ids: Tensor, pad: int | None, streamer: Any) -> None:
        self._input_ids = input_ids
        self._pad = pad
        self._streamer = streamer
        self._new: list[list[int]] = [[] for _ in input_ids]
        self._ended = [False] * len(input_ids)
        self._streamed = 0
        self.rotary_lengths: list[int | None] = [None] * len(input_ids)
        if streamer is not None:
            streamer.put(input_ids.cpu())

    def add(self, row: int, tokens: list[int], ended: bool) -> None:
        if self._ended[row]:
            return  # a step that the engine ran before it was cancelled
        self._new[row] += tokens
        self._ended[row] = ended
        if self._streamer is not None:
            complete = min((len(new) for new, end in zip(self._new, self._ended) if not end), default=self._width)
            for at in range(self._streamed, complete):
                self._streamer.put(torch.tensor([self._token(new, at) for new in self._new]))
            self._streamed = max(self._streamed, complete)

    @property
    def _width(self) -> int:
        return max(map(len, self._new))

    def _token(self, new: list[int], at: int) -> int:
        if at < len(new):
            return new[at]
        if self._pad is None:
            raise ToolkitError("pad_token_id must be a token id where rows end at different lengths, got None.")
        return self._pad

    def row(self, row: int) -> Tensor:
        """[1, length] of one row as far as it is."""
        new = torch.tensor(self._new[row], dtype=torch.int64, device=self._input_ids.device)
        return torch.cat([self._input_ids[row], new])[None]

    def finish(self) -> Tensor:
        """[B, length + longest] of all rows."""
        new = [[self._token(one, at) for at in range(self._width)] for one in self._new]
        if self._streamer is not None:
            self._streamer.end()
        return torch.cat([self._input_ids, torch.tensor(new, dtype=torch.int64, device=self._input_ids.device)], 1)


def _logits(
    model: nn.Module, prompts: list[list[int]], new: Tensor, rotary_lengths: list[int | None]
) -> tuple[Tensor, ...]:
    """Of each column of ``new`` [B, N] the logits [B, V] float32 that its tokens were sampled from; transformers, too,
    runs on over the padding of what is ended."""
    rows, width = new.shape
    texts = [prompt + tokens[:-1] for prompt, tokens in zip(prompts, new.tolist(), strict=True)]
    # A row that ended and runs on over padding keeps its tables.
    rotary = choose_rotary_lengths(model, [1] * rows, rotary_lengths)
    batch = RaggedBatch.from_sequences(texts, next(model.parameters()).device, share=False, rotary_lengths=rotary)
    ends = torch.tensor([len(text) for text in texts]).cumsum(0)
    rows_at = (ends[:, None] - width + torch.arange(width)).flatten()
    with eval_mode(model):
        logits = ragged_forward(model, batch, rows_at.to(batch.tokens.device)).float()
    return tuple(logits.view(rows, width, -1).to(new.device).unbind(1))
