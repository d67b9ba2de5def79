"""How one request is sampled: vLLM's field names, checked when the object is made."""

import inspect
import math
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, ClassVar

from toolkit.engine.checks import check_bool, check_float, check_int, check_names
from toolkit.engine.grammar.params import StructuredOutputsParams
from toolkit.errors import ToolkitError

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy; dividing by them would only overflow."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample the tokens of one request. The order is penalties, temperature, top_k, top_p, min_p.

    Args:
        n: completions of the prompt.
        max_tokens: most tokens of a completion; None for up to max_model_len.
        min_tokens: before this many tokens no end-of-text token, stop token or stop string ends a completion.
        temperature: divides the logits; 0 is greedy, the lowest id among equals.
        top_k: keep this many of the most probable tokens; 0 or -1 is off.
        top_p: keep the most probable tokens up to this probability mass; 1 is off.
        min_p: keep tokens of at least this probability relative to the largest; 0 is off.
        stop: a string or strings that end the text, and are cut from it unless ``include_stop_str_in_output``.
        stop_token_ids: tokens that end a completion as the end-of-text token does.
        ignore_eos: continue after the end-of-text token.
        seed: a token is a function of (seed, index among the n, tokens so far, logits); None takes a fresh seed.
        logprobs: also return this many of the most probable tokens at each step, under the model's own distribution.
        skip_special_tokens: leave special tokens out of ``text``.
        cache_salt: share cached prefixes only with requests of the same salt; None with those that have none.
        include_stop_str_in_output: keep the stop string or stop token that ended the text.
        repetition_penalty: over prompt and output, divides positive logits and multiplies negative ones; 1e-5 to 1e5.
        presence_penalty: subtracted once for each distinct token of the output.
        frequency_penalty: subtracted once for each occurrence in the output.
        structured_outputs: the form of the output, a ``StructuredOutputsParams`` or a mapping of its fields. Tokens
            that the form forbids are not sampled, nor end-of-text and stop tokens where the output is not complete.

    Raises:
        ToolkitError: for an unknown field or a bad value.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    skip_special_tokens: bool = True
    cache_salt: str | None = None
    include_stop_str_in_output: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    structured_outputs: StructuredOutputsParams | dict[str, Any] | None = None

    __signature__: ClassVar[inspect.Signature]

    def __new__(cls, *args: Any, **given: Any) -> "SamplingParams":
        if args:
            raise ToolkitError("SamplingParams takes its fields by name, such as SamplingParams(max_tokens=64).")
        check_names("SamplingParams", given, tuple(field.name for field in fields(cls)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "n": check_int("n", self.n, 1),
            "min_tokens": check_int("min_tokens", self.min_tokens, 0),
            "temperature": check_float("temperature", self.temperature, 0, math.inf),
            "top_k": check_int("top_k", self.top_k, -1, also=" (0 and -1 are off)"),
            "top_p": check_float("top_p", self.top_p, 0, 1, open_low=True),
            "min_p": check_float("min_p", self.min_p, 0, 1),
            "stop": _strings(self.stop),
            "stop_token_ids": _token_ids(self.stop_token_ids),
            "ignore_eos": check_bool("ignore_eos", self.ignore_eos),
            "skip_special_tokens": check_bool("skip_special_tokens", self.skip_special_tokens),
            "include_stop_str_in_output": check_bool("include_stop_str_in_output", self.include_stop_str_in_output),
            # Beyond these a float32 logit, divided by the penalty and by a small temperature, would overflow.
            "repetition_penalty": check_float("repetition_penalty", self.repetition_penalty, 1e-5, 1e5),
            "presence_penalty": check_float("presence_penalty", self.presence_penalty, -2, 2),
            "frequency_penalty": check_float("frequency_penalty", self.frequency_penalty, -2, 2),
            "structured_outputs": StructuredOutputsParams.read(self.structured_outputs),
        }
        if self.max_tokens is not None:
            checked["max_tokens"] = check_int("max_tokens", self.max_tokens, 1, also=" or None")
            if checked["min_tokens"] > checked["max_tokens"]:
                raise ToolkitError(f"min_tokens must be <= max_tokens ({self.max_tokens}), got {self.min_tokens}.")
        if self.seed is not None:
            checked["seed"] = check_int("seed", self.seed, -(2**63), 2**64 - 1, also=", or None")
        if self.logprobs is not None:
            checked["logprobs"] = check_int("logprobs", self.logprobs, 0, also=" or None")
        if self.cache_salt is not None and not (isinstance(self.cache_salt, str) and self.cache_salt):
            raise ToolkitError(f"cache_salt must be a string that is not empty or None, got {self.cache_salt!r}.")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken instead of a sample."""
        return self.temperature < GREEDY_BELOW

    @property
    def form(self) -> StructuredOutputsParams | None:
        """``structured_outputs`` as it was read."""
        return StructuredOutputsParams.read(self.structured_outputs)

    @property
    def penalised(self) -> bool:
        """Whether any of the three penalties is on."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


# ``help`` and editors are to show the fields, not the ``__new__`` that catches unknown ones.
SamplingParams.__signature__ = inspect.Signature(
    list(inspect.signature(SamplingParams.__init__).parameters.values())[1:]
)


def _strings(stop: Any) -> tuple[str, ...]:
    strings = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(one, str) and one for one in strings):
        raise ToolkitError(f"stop must be a string that is not empty, a list of such strings or None, got {stop!r}.")
    return tuple(strings)


def _token_ids(ids: Any) -> tuple[int, ...]:
    given = () if ids is None else ids
    if not isinstance(given, list | tuple | set | frozenset) or not all(
        isinstance(one, Integral) and not isinstance(one, bool) and int(one) >= 0 for one in given
    ):
        raise ToolkitError(f"stop_token_ids must be a list of token ids or None, got {ids!r}.")
    return tuple(int(one) for one in given)
