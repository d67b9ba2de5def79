"""What a request asks for: vLLM's field names, checked when the object is made."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from toolkit.errors import ToolkitError, nearest

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy; dividing by them would only overflow."""


def whole(field: str, value: Any, low: int, high: int | None = None, also: str = "") -> int:
    """``value`` as an int within [low, high], or a ToolkitError that says what is allowed."""
    good = isinstance(value, Integral) and not isinstance(value, bool)
    if not good or int(value) < low or (high is not None and int(value) > high):
        upper = "up" if high is None else f"to {high}"
        raise ToolkitError(f"{field} is {value!r}; allowed are whole numbers from {low} {upper}{also}.")
    return int(value)


def number(field: str, value: Any, low: float, high: float, open_low: bool = False) -> float:
    """``value`` as a float within [low, high] (``open_low``: above low), or a ToolkitError."""
    good = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
    if not good or not low <= float(value) <= high or (open_low and float(value) == low):
        lower = f"above {low:g}" if open_low else f"from {low:g}"
        upper = "up" if math.isinf(high) else f"to {high:g}"
        raise ToolkitError(f"{field} is {value!r}; allowed are finite numbers {lower} {upper}.")
    return float(value)


def flag(field: str, value: Any) -> bool:
    """``value`` if it is a bool, or a ToolkitError."""
    if not isinstance(value, bool):
        raise ToolkitError(f"{field} is {value!r}; allowed are True and False.")
    return value


def refuse_unknown(owner: str, given: Iterable[str], allowed: tuple[str, ...]) -> None:
    """Raise a ToolkitError for the first name that is not a field, with the nearest one that is."""
    for name in given:
        if name not in allowed:
            hint = nearest(name, allowed) or f"; allowed are {', '.join(allowed)}"
            raise ToolkitError(f"{name!r} is not a field of {owner}{hint}.")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw the tokens of one request.

    n: completions of the prompt. max_tokens: most tokens a completion (None: up to max_model_len).
    min_tokens: before this many, no end-of-text token, stop token or stop string ends it.
    temperature: logits are divided by it; 0 is greedy (lowest id among equals). top_k: 0 or -1 off.
    top_p, min_p: nucleus mass, and least probability relative to the largest.
    stop: a string or strings that end the text, and are cut from it unless ``include_stop_str_in_output``.
    stop_token_ids: tokens that end it like the end-of-text token. ignore_eos: go on after the latter.
    seed: a draw is a function of (seed, index among the n, tokens so far, logits); None draws a fresh seed.
    logprobs: also report this many of the likeliest tokens a step, under the model's own distribution.
    skip_special_tokens: leave special tokens out of ``text``.
    repetition_penalty: over prompt and output, divides positive and multiplies negative logits.
    presence_penalty, frequency_penalty: over output, subtracted once a distinct token and once an occurrence.

    Order: penalties, temperature, top_k, top_p, min_p. Raises ToolkitError for any bad or unknown field.
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
    include_stop_str_in_output: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __new__(cls, *args: Any, **given: Any) -> "SamplingParams":
        if args:
            raise ToolkitError("SamplingParams takes its fields by name, such as SamplingParams(max_tokens=64).")
        refuse_unknown("SamplingParams", given, tuple(field.name for field in fields(cls)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "n": whole("n", self.n, 1),
            "min_tokens": whole("min_tokens", self.min_tokens, 0),
            "temperature": number("temperature", self.temperature, 0, math.inf),
            "top_k": whole("top_k", self.top_k, -1, also=" (0 and -1 are off)"),
            "top_p": number("top_p", self.top_p, 0, 1, open_low=True),
            "min_p": number("min_p", self.min_p, 0, 1),
            "stop": _strings(self.stop),
            "stop_token_ids": _token_ids(self.stop_token_ids),
            "ignore_eos": flag("ignore_eos", self.ignore_eos),
            "skip_special_tokens": flag("skip_special_tokens", self.skip_special_tokens),
            "include_stop_str_in_output": flag("include_stop_str_in_output", self.include_stop_str_in_output),
            "repetition_penalty": number("repetition_penalty", self.repetition_penalty, 0, math.inf, open_low=True),
            "presence_penalty": number("presence_penalty", self.presence_penalty, -2, 2),
            "frequency_penalty": number("frequency_penalty", self.frequency_penalty, -2, 2),
        }
        if self.max_tokens is not None:
            checked["max_tokens"] = whole("max_tokens", self.max_tokens, 1, also=", and None")
            if checked["min_tokens"] > checked["max_tokens"]:
                raise ToolkitError(
                    f"min_tokens is {self.min_tokens}; allowed are 0 to {self.max_tokens}, the max_tokens."
                )
        if self.seed is not None:
            checked["seed"] = whole("seed", self.seed, -(2**63), 2**64 - 1, also=", and None")
        if self.logprobs is not None:
            checked["logprobs"] = whole("logprobs", self.logprobs, 0, also=", and None")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken instead of a draw."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """Whether any of the three penalties is on."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _strings(stop: Any) -> tuple[str, ...]:
    strings = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(one, str) and one for one in strings):
        raise ToolkitError(f"stop is {stop!r}; allowed are a string that is not empty, a list of those, and None.")
    return tuple(strings)


def _token_ids(ids: Any) -> tuple[int, ...]:
    given = () if ids is None else ids
    if not isinstance(given, list | tuple | set | frozenset) or not all(
        isinstance(one, Integral) and not isinstance(one, bool) and int(one) >= 0 for one in given
    ):
        raise ToolkitError(f"stop_token_ids is {ids!r}; allowed are a list of token ids and None.")
    return tuple(int(one) for one in given)
