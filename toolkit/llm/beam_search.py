"""Beam search over an engine: each step asks it for the most probable next tokens of all beams.

A beam forks the blocks of the one that it extends, so a step computes one row of each, as a decode step does.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from toolkit.engine import Completion, Engine, SamplingParams
from toolkit.engine.checks import check_bool, check_float, check_int
from toolkit.engine.prompts import check_token_count
from toolkit.errors import ToolkitError
from toolkit.sentences import shown

MOST_PENALTY = 32.0
"""Bounds ``length_penalty``: powers of any length of a sequence stay within float64."""


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How to search; the names are vLLM's.

    Args:
        beam_width: beams that are kept, and returned.
        max_tokens: most tokens of a beam, behind the prompt.
        ignore_eos: continue after the end-of-text token.
        length_penalty: beams are ranked by sum(log-probabilities) / n ** length_penalty, n tokens of prompt and beam
            without the end-of-text token (as in vLLM; transformers counts those of the beam alone); -32 to 32.

    Raises:
        ToolkitError: for a bad value.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_int("beam_width", self.beam_width, 1)
        check_int("max_tokens", self.max_tokens, 1)
        check_bool("ignore_eos", self.ignore_eos)
        check_float("length_penalty", self.length_penalty, -MOST_PENALTY, MOST_PENALTY)


@dataclass(frozen=True)
class BeamSearchSequence:
    """One beam.

    Args:
        tokens: of the prompt and of the beam.
        cum_logprob: the sum of the log-probabilities of the beam's tokens.
        logprobs: of each of the beam's tokens.
        text: of all tokens, special ones left out; None without a tokenizer.
        finish_reason: "stop" for one that ended with an end-of-text token, else "length".
    """

    tokens: list[int]
    cum_logprob: float = 0.0
    logprobs: list[float] = field(default_factory=list)
    text: str | None = None
    finish_reason: str = "length"

    def extended(self, token: int, logprob: float, finish_reason: str) -> "BeamSearchSequence":
        """The beam with one more token."""
        total = self.cum_logprob + logprob
        return BeamSearchSequence([*self.tokens, token], total, [*self.logprobs, logprob], None, finish_reason)


@dataclass(frozen=True)
class BeamSearchOutput:
    """sequences: the best beams of a prompt, best first."""

    sequences: list[BeamSearchSequence]


class _Search:
    """The beams of one prompt."""

    def __init__(self, prompt: list[int], params: BeamSearchParams, eos: frozenset[int]) -> None:
        self.params, self.eos = params, frozenset() if params.ignore_eos else eos
        self.running = [BeamSearchSequence(prompt)]
        self.finished: list[BeamSearchSequence] = []

    def extend(self, completions: Sequence[Completion]) -> None:
        """One step: every beam with each of its most probable next tokens, of which the best are kept."""
        found = []
        for beam, one in zip(self.running, completions, strict=True):
            assert one.top_logprobs is not None
            for token, logprob in one.top_logprobs[0].items():
                if token in self.eos:
                    self.finished.append(beam.extended(token, logprob, "stop"))
                else:
                    found.append(beam.extended(token, logprob, "length"))
        found.sort(key=lambda beam: -beam.cum_logprob)
        self.running = found[: self.params.beam_width]

    def score(self, beam: BeamSearchSequence) -> float:
        count = len(beam.tokens) - (beam.finish_reason == "stop")
        return beam.cum_logprob / float(max(count, 1) ** self.params.length_penalty)

    def best(self) -> list[BeamSearchSequence]:
        """What is returned, when no more tokens are asked for."""
        found = sorted([*self.finished, *self.running], key=lambda beam: -self.score(beam))
        return found[: self.params.beam_width]


def beam_search(
    engine: Engine, prompts: Sequence[list[int]], params: BeamSearchParams, tokenizer: Any
) -> list[BeamSearchOutput]:
    """The best beams of each prompt of token ids, all prompts together.

    Raises:
        ToolkitError: a prompt behind which ``max_tokens`` do not fit, or that cannot run.
    """
    if not isinstance(params, BeamSearchParams):
        raise ToolkitError(f"params must be BeamSearchParams, got {shown(params)}.")
    longest = engine.max_sequence_len
    for prompt in prompts:
        check_token_count(len(prompt), longest)
        if len(prompt) + params.max_tokens > longest:
            raise ToolkitError(
                f"max_tokens must be <= {longest - len(prompt)} after a prompt of {len(prompt)} tokens, got "
                f"{params.max_tokens}."
            )
    width = min(2 * params.beam_width, engine.vocab_size)
    step = SamplingParams(max_tokens=1, temperature=0, logprobs=width, ignore_eos=True)
    searches = [_Search(prompt, params, engine.eos) for prompt in prompts]
    with engine.scheduler.fork_points.kept() as parents:
        for _ in range(params.max_tokens):
            completions = iter(engine.generate([beam.tokens for one in searches for beam in one.running], step))
            for one in searches:
                one.extend([_without_error(next(completions)) for _ in one.running])
            parents.expect(Counter(tuple(beam.tokens[:-1]) for one in searches for beam in one.running))
    return [BeamSearchOutput([_with_text(beam, tokenizer) for beam in one.best()]) for one in searches]


def _without_error(completion: Completion) -> Completion:
    if completion.finish_reason == "error":
        raise ToolkitError(f"The request failed in the engine: {str(completion.error).rstrip('.')}.")
    return completion


def _with_text(beam: BeamSearchSequence, tokenizer: Any) -> BeamSearchSequence:
    text = None if tokenizer is None else str(tokenizer.decode(beam.tokens, skip_special_tokens=True))
    return replace(beam, text=text)
