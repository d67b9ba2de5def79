"""``model.generate`` of a patched model by the engine: transformers reads the arguments, the engine draws the tokens.

    toolkit.patch(model)
    with route_generate(model):
        model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), max_new_tokens=64)

The seam is ``custom_generate``: transformers merges configurations, expands inputs, makes its processors and criteria,
and calls a function of ours in the place of its own loop.
"""

import copy
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from infer_patches.generation_config import SAMPLING, refuse_unsupported, sampling_params
from infer_patches.route import Route
from toolkit import Engine
from toolkit.errors import ToolkitError, nearest
from toolkit.patching import ragged_forward
from toolkit.patching.eval_mode import eval_mode
from toolkit.state import RaggedBatch

_INPUTS = ("inputs", "input_ids", "attention_mask", "generation_config", "stopping_criteria", "streamer", "tokenizer")
_HONOURED = SAMPLING | {
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
    """``model.generate`` on its way to ``engine``."""

    def __init__(self, model: nn.Module, engine: Engine | None, fallback: bool, limits: dict[str, Any]) -> None:
        super().__init__(model, generate)
        self.fallback = fallback
        self._owned = engine is None
        try:
            self.engine = Engine(model, **limits) if engine is None else engine
        except BaseException:
            super().undo()
            raise

    def undo(self) -> None:
        super().undo()
        if self._owned:
            self.engine.close()


def route_generate(
    model: nn.Module, engine: Engine | None = None, fallback: bool = False, **limits: Any
) -> GenerateRoute:
    """Let ``model.generate`` of a patched causal LM run on the engine, until ``undo()`` of the result.

    engine: one of this model's, which is left open; None makes one with ``limits`` (``toolkit.engine.Limits``).
    fallback: hand calls that the engine cannot do to transformers' own generate, in the place of an error.

    ``generate`` takes input_ids and attention_mask (padded left or right); GenerationConfig, keyword arguments, both:
    max_new_tokens, max_length, min_new_tokens, min_length, do_sample, temperature, top_k, top_p, min_p,
    repetition_penalty, num_return_sequences, eos_token_id, pad_token_id, stop_strings with tokenizer, max_time,
    return_dict_in_generate, output_scores, output_logits; streamer and stopping_criteria. Others are refused by name.
    It returns what transformers returns: ids [B * num_return_sequences, longest] int64, ended rows padded on the right.

    What differs. Drawn tokens: of the same distribution, by seeds that come from torch's global generator, so that
    ``torch.manual_seed`` repeats them, but not the ones that transformers would draw. Prompts padded on the right go on
    as they would alone (transformers warns and goes on from the padding). stopping_criteria see one row [1, length] at
    a time, and no scores. Scores and logits are those of one more forward over the finished rows: in the bitwise tier
    those that were drawn from. ``past_key_values`` is None.

    Raises ToolkitError for a model that is not patched, or is routed already, and for limits that are not allowed.
    """
    if engine is not None and limits:
        raise ToolkitError(f"engine is given, and {', '.join(limits)} beside it; allowed is one of the two.")
    return GenerateRoute(model, engine, fallback, limits)


def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate`` as a routed model has it; a copy of such a model, which has no engine, runs transformers' own."""
    route = GenerateRoute.of.get(self)
    if route is None:
        return type(self).generate(self, *args, **kwargs)
    own, loop = route.own(self, "generate"), _Loop(route.engine)
    try:
        return own(**_accepted(self, args, kwargs, loop), custom_generate=loop)
    except ToolkitError:
        if not route.fallback or loop.started:
            raise
        return own(*args, **kwargs)


def _accepted(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], loop: "_Loop") -> dict[str, Any]:
    """The arguments of a call by name, less those that ``loop`` keeps; a ToolkitError for what is not taken."""
    from transformers import GenerationConfig
    from transformers.generation import StoppingCriteriaList, StopStringCriteria

    signature = inspect.signature(type(model).generate)
    given = dict(signature.bind(model, *args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    del given[next(iter(signature.parameters))]
    known = vars(GenerationConfig())
    for name, value in given.items():
        nothing = value is None or (isinstance(value, bool | list) and not value)
        if name not in _INPUTS and name not in known and not nothing:
            allowed = (*_INPUTS, *sorted(_HONOURED))
            hint = nearest(name, allowed) or f"; allowed are {', '.join(allowed)}"
            raise ToolkitError(f"{name!r} is not an argument that generate takes on the engine{hint}.")
    loop.streamer, tokenizer = given.pop("streamer", None), given.pop("tokenizer", None)
    config = given.get("generation_config")
    sources = [given.get("stop_strings"), getattr(config, "stop_strings", None), model.generation_config.stop_strings]
    strings = next((one for one in sources if one is not None), None)
    if strings is not None:
        # transformers gives no tokenizer to a loop that is not its own, so the criterion is made here.
        if tokenizer is None:
            raise ToolkitError(f"stop_strings is {strings!r}, but tokenizer is None; allowed is the model's tokenizer.")
        criteria = [*(given.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, strings)]
        given["stopping_criteria"] = StoppingCriteriaList(criteria)
        if config is not None:
            given["generation_config"] = copy.copy(config)
            given["generation_config"].stop_strings = None
        if sources[0] is not None or sources[2] is not None:
            given["stop_strings"] = None
    return given


class _Loop:
    """The decoding loop of one call: what transformers calls once inputs, configuration and criteria are prepared.

    started: whether tokens are being drawn, after which there is no falling back.
    """

    def __init__(self, engine: Engine) -> None:
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
        from transformers.generation import GenerateDecoderOnlyOutput, StoppingCriteriaList

        config = generation_config
        refuse_unsupported(config, _HONOURED)
        rows, length = input_ids.shape
        ends, others = _split(stopping_criteria)
        pad = next((one for one in (config.pad_token_id, *ends) if one is not None), None)
        max_tokens = stopping_criteria.max_length - length
        prompts = _prompts(input_ids, model_inputs.get("attention_mask"))
        # A request's completions can be ended only together: with criteria each is a request of its own.
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
            if others and finished is None and bool(criteria(columns.row(row), None).all()):
                columns.add(row, [], True)
                self.engine.cancel(delta.request_id)
        sequences = columns.finish()
        if not config.return_dict_in_generate:
            return sequences
        logits = scores = None
        if config.output_logits or config.output_scores:
            logits = _logits(model, prompts, sequences[:, length:])
        if config.output_scores:
            scores = tuple(
                logits_processor(sequences[:, : length + at], one.clone()) for at, one in enumerate(logits or ())
            )
        asked: Any = logits if config.output_logits else None
        return GenerateDecoderOnlyOutput(cast(torch.LongTensor, sequences), scores=scores, logits=asked)


def _seed() -> int:
    """Of one request, from torch's global generator."""
    return int(torch.randint(2**63 - 1, ()))


def _split(stopping_criteria: Any) -> tuple[list[int], list[Any]]:
    """The tokens that end a row, and the criteria that the engine does not know itself."""
    from transformers.generation import EosTokenCriteria, MaxLengthCriteria

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
            raise ToolkitError(f"attention_mask leaves {what} in row {row}; allowed is padding on the left or right.")
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
        if streamer is not None:
            streamer.put(input_ids.cpu())

    def add(self, row: int, tokens: list[int], ended: bool) -> None:
        if self._ended[row]:
            return  # what another thread's step still drew
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
            raise ToolkitError("pad_token_id is None, but rows end at different lengths; allowed is a token id.")
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


def _logits(model: nn.Module, prompts: list[list[int]], new: Tensor) -> tuple[Tensor, ...]:
    """Of each column of ``new`` [B, N] the logits [B, V] float32 that its tokens were drawn from; transformers, too,
    runs on over the padding of what is ended."""
    rows, width = new.shape
    texts = [prompt + tokens[:-1] for prompt, tokens in zip(prompts, new.tolist(), strict=True)]
    batch = RaggedBatch.from_sequences(texts, next(model.parameters()).device, share=False)
    ends = torch.tensor([len(text) for text in texts]).cumsum(0)
    places = (ends[:, None] - width + torch.arange(width)).flatten()
    with eval_mode(model):
        logits = ragged_forward(model, batch, places.to(batch.tokens.device)).float()
    return tuple(logits.view(rows, width, -1).to(new.device).unbind(1))
