"""How one request is sampled: vLLM's field names, checked when the object is made."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, ClassVar

from toolkit.engine.checks import check_bool, check_cut, check_float, check_int, check_names
from toolkit.engine.grammar.params import StructuredOutputsParams
from toolkit.errors import ToolkitError
from toolkit.sentences import shown

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy; dividing by them would only overflow."""
MAX_BIAS = 100.0
"""Bounds ``logit_bias``, as vLLM does."""
MAX_SEQUENCES = 16_384
"""Bounds ``n`` and ``best_of``, as vLLM does: every sequence takes memory before the first one runs."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample the tokens of one request.

    The order is logits_processors, logit_bias, allowed_token_ids, bad_words, penalties, min_tokens, DRY,
    structured_outputs, typical_p, XTC, temperature, top_k, top_p, min_p.

    Args:
        n: completions of the prompt.
        best_of: candidates, of which the ``n`` with the highest mean log-probability are returned, best first; None for
            ``n``. Beyond ``n`` nothing is streamed: deltas come when all candidates have finished.
        max_tokens: most tokens of a completion; None for up to max_model_len. 0 computes the prompt and samples
            nothing.
        min_tokens: before this many tokens no end-of-text token, stop token or stop string ends a completion.
        temperature: divides the logits; 0 is greedy, the lowest id among equals.
        top_k: keep this many of the most probable tokens; 0 or -1 is off.
        top_p: keep the most probable tokens up to this probability mass; 1 is off.
        min_p: keep tokens of at least this probability relative to the largest; 0 is off.
        typical_p: keep the tokens whose information is nearest to the entropy, up to this probability mass, at
            temperature 1; 1 is off. Off where greedy, as XTC.
        xtc_probability: at this part of the places leave out, of the tokens of a probability of ``xtc_threshold`` or
            more at temperature 1, all but the least probable one; 0 is off.
        xtc_threshold: see there.
        dry_multiplier: subtract ``dry_multiplier * dry_base ** (n - dry_allowed_length)`` from the logits of tokens
            that followed the last n >= ``dry_allowed_length`` tokens of prompt and output before; 0 is off.
        dry_base, dry_allowed_length: see there; a base of 1 to 4, as runs of up to 50 tokens count.
        dry_sequence_breakers: strings whose last token ends such runs, and is not penalised. None: a line break, a
            colon, a quotation mark and an asterisk, where there is a tokenizer.
        stop: a string or strings that end the text, and are cut from it unless ``include_stop_str_in_output``.
        stop_token_ids: tokens that end a completion as the end-of-text token does.
        ignore_eos: continue after the end-of-text token.
        seed: a token is a function of (seed, index among the n, tokens so far, logits); None takes a fresh seed.
        logprobs: also return this many of the most probable tokens at each step, under the model's own distribution;
            -1 for all of the vocabulary.
        prompt_logprobs: also return the log-probability of each token of the prompt and this many of the most probable
            ones, -1 for all, under the model's own distribution; the prompt is computed whole, with no cached prefix.
        truncate_prompt_tokens: keep the last so many tokens of a longer prompt; -1: as many as fit before
            ``max_tokens``. None refuses prompts that do not fit.
        timeout: seconds after which the request ends with "timeout", whether it runs or still waits. They begin when
            the engine queues it, and are looked at between steps. None for no bound.
        predicted_token_ids: tokens that the output is expected to have, such as those of a file that it edits. With
            speculation they are drafted, which changes no result; ``Completion`` says how many of them came.
        skip_special_tokens: leave special tokens out of ``text``.
        kept_special_tokens: ids of those that stay in ``text`` all the same, such as the markers of tool calls.
        cache_salt: share cached prefixes only with requests of the same salt; None with those that have none.
        include_stop_str_in_output: keep the stop string or stop token that ended the text.
        repetition_penalty: over prompt and output, divides positive logits and multiplies negative ones; 1e-5 to 1e5.
        presence_penalty: subtracted once for each distinct token of the output.
        frequency_penalty: subtracted once for each occurrence in the output.
        structured_outputs: the form of the output, a ``StructuredOutputsParams`` or a mapping of its fields. Tokens
            that the form forbids are not sampled, nor end-of-text and stop tokens where the output is not complete.
        logit_bias: what is added to the logits of tokens, by token id, each at least -100 and at most 100 (what is
            beyond is cut to that).
        allowed_token_ids: sample these tokens alone; end-of-text and stop tokens too are sampled only if among them.
        bad_words: strings that the output must not have. Each is tokenised as the beginning of a text and behind a
            space, and its last token is not sampled where the output ends in those before it.
        logits_processors: callables (token ids of the output, logits [V]) -> logits [V], or of the prompt's token ids
            and these; in order. What they return must depend on what they are given alone: with speculation they see
            drafts, too.
        lora_name: the adapter that acts on the request, of those in the model and those that the engine has loaded;
            None for what is active in the model.
        priority: requests of a lower one run first, among equals those that came first.

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
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_sequence_breakers: list[str] | tuple[str, ...] | None = None
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
    logit_bias: dict[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: list[int] | tuple[int, ...] | None = None
    bad_words: list[str] | tuple[str, ...] | None = None
    logits_processors: list[Callable[..., Any]] | tuple[Callable[..., Any], ...] | None = None
    priority: int = 0
    lora_name: str | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    best_of: int | None = None
    timeout: float | None = None
    predicted_token_ids: list[int] | tuple[int, ...] | None = None
    kept_special_tokens: list[int] | tuple[int, ...] | None = None

    __signature__: ClassVar[inspect.Signature]

    def __new__(cls, *args: Any, **given: Any) -> "SamplingParams":
        if args:
            raise ToolkitError("SamplingParams takes its fields by name, such as SamplingParams(max_tokens=64).")
        check_names("SamplingParams", given, tuple(one.name for one in fields(cls)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "n": check_int("n", self.n, 1, MAX_SEQUENCES),
            "min_tokens": check_int("min_tokens", self.min_tokens, 0),
            "temperature": check_float("temperature", self.temperature, 0, math.inf),
            "top_k": check_int("top_k", self.top_k, -1, also=" (0 and -1 are off)"),
            "top_p": check_float("top_p", self.top_p, 0, 1, open_low=True),
            "min_p": check_float("min_p", self.min_p, 0, 1),
            "typical_p": check_float("typical_p", self.typical_p, 0, 1, open_low=True),
            "xtc_probability": check_float("xtc_probability", self.xtc_probability, 0, 1),
            "xtc_threshold": check_float("xtc_threshold", self.xtc_threshold, 0, 1),
            "dry_multiplier": check_float("dry_multiplier", self.dry_multiplier, 0, 100),
            "dry_base": check_float("dry_base", self.dry_base, 1, 4),
            "dry_allowed_length": check_int("dry_allowed_length", self.dry_allowed_length, 1),
            "stop": _strings("stop", self.stop, one=True),
            "stop_token_ids": _token_ids("stop_token_ids", self.stop_token_ids) or (),
            "ignore_eos": check_bool("ignore_eos", self.ignore_eos),
            "skip_special_tokens": check_bool("skip_special_tokens", self.skip_special_tokens),
            "include_stop_str_in_output": check_bool("include_stop_str_in_output", self.include_stop_str_in_output),
            # Beyond these a float32 logit, divided by the penalty and by a small temperature, would overflow.
            "repetition_penalty": check_float("repetition_penalty", self.repetition_penalty, 1e-5, 1e5),
            "presence_penalty": check_float("presence_penalty", self.presence_penalty, -2, 2),
            "frequency_penalty": check_float("frequency_penalty", self.frequency_penalty, -2, 2),
            "structured_outputs": StructuredOutputsParams.read(self.structured_outputs),
            "logit_bias": _bias(self.logit_bias),
            "allowed_token_ids": _token_ids("allowed_token_ids", self.allowed_token_ids),
            "bad_words": _strings("bad_words", self.bad_words),
            "logits_processors": _callables(self.logits_processors),
            "kept_special_tokens": _token_ids("kept_special_tokens", self.kept_special_tokens) or (),
            "predicted_token_ids": _token_ids("predicted_token_ids", self.predicted_token_ids, ordered=True),
            "priority": check_int("priority", self.priority, -(2**63), 2**63 - 1),
        }
        if self.dry_sequence_breakers is not None:
            checked["dry_sequence_breakers"] = _strings("dry_sequence_breakers", self.dry_sequence_breakers)
        if checked["allowed_token_ids"] == ():
            raise ToolkitError("allowed_token_ids must have >= 1 token ids or be None, got none.")
        if self.max_tokens is not None:
            checked["max_tokens"] = check_int("max_tokens", self.max_tokens, 0, also=" or None")
            if checked["min_tokens"] > checked["max_tokens"]:
                raise ToolkitError(
                    f"min_tokens must be <= max_tokens ({shown(self.max_tokens)}), got {shown(self.min_tokens)}."
                )
        if self.seed is not None:
            checked["seed"] = check_int("seed", self.seed, -(2**63), 2**64 - 1, also=", or None")
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                checked[name] = check_int(name, value, -1, also=" (all of the vocabulary) or None")
        if self.truncate_prompt_tokens is not None:
            checked["truncate_prompt_tokens"] = check_cut("truncate_prompt_tokens", self.truncate_prompt_tokens)
        if self.best_of is not None:
            checked["best_of"] = check_int("best_of", self.best_of, checked["n"], MAX_SEQUENCES, also=", or None for n")
        if self.timeout is not None:
            checked["timeout"] = check_float("timeout", self.timeout, 0, math.inf, open_low=True)
        if self.cache_salt is not None and not (isinstance(self.cache_salt, str) and self.cache_salt):
            raise ToolkitError(f"cache_salt must be a string that is not empty or None, got {shown(self.cache_salt)}.")
        if self.lora_name is not None and not (isinstance(self.lora_name, str) and self.lora_name):
            raise ToolkitError(f"lora_name must be the name of an adapter or None, got {shown(self.lora_name)}.")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken instead of a sample."""
        return self.temperature < GREEDY_BELOW

    @property
    def cuts_tails(self) -> bool:
        """Whether ``typical_p`` or XTC leave tokens out."""
        return not self.greedy and (self.typical_p < 1 or self.xtc_probability > 0)

    @property
    def num_candidates(self) -> int:
        """Sequences that are sampled: ``best_of``, or ``n``."""
        return self.n if self.best_of is None else self.best_of

    @property
    def chooses(self) -> bool:
        """Whether more sequences are sampled than returned."""
        return self.num_candidates > self.n

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


def _strings(field: str, given: Any, one: bool = False) -> tuple[str, ...]:
    """A list of strings as a tuple; with ``one``, of one string too."""
    strings = () if given is None else (given,) if one and isinstance(given, str) else given
    if not isinstance(strings, list | tuple) or not all(isinstance(each, str) and each for each in strings):
        kinds = "a string that is not empty, a list of such strings" if one else "a list of strings that are not empty"
        raise ToolkitError(f"{field} must be {kinds} or None, got {shown(given)}.")
    return tuple(strings)


def _token_ids(field: str, ids: Any, ordered: bool = False) -> tuple[int, ...] | None:
    if ids is None:
        return None
    kinds = (list, tuple) if ordered else (list, tuple, set, frozenset)
    if not isinstance(ids, kinds) or not all(map(_is_token_id, ids)):
        raise ToolkitError(f"{field} must be a list of token ids or None, got {shown(ids)}.")
    return tuple(int(one) for one in ids)


def _is_token_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _bias(given: Any) -> dict[int, float] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping) or not all(map(_is_token_id, given)):
        raise ToolkitError(f"logit_bias must be a mapping of token ids to numbers or None, got {shown(given)}.")
    found = {}
    for token, bias in given.items():
        checked = check_float(f"logit_bias[{shown(token)}]", bias, -math.inf, math.inf)
        found[int(token)] = max(-MAX_BIAS, min(MAX_BIAS, checked))
    return found


def _callables(given: Any) -> tuple[Callable[..., Any], ...]:
    processors = () if given is None else given
    if not isinstance(processors, list | tuple) or not all(map(callable, processors)):
        raise ToolkitError(f"logits_processors must be a list of callables or None, got {shown(given)}.")
    return tuple(processors)
