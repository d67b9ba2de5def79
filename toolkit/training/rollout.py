"""Rollouts: one engine on the live weights, made once, used by training and by held-out measures."""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeVar, cast

from toolkit.config.objective import RolloutSection
from toolkit.engine import Engine, SamplingParams, StructuredOutputsParams
from toolkit.engine.outputs import Completion, Delta
from toolkit.errors import ToolkitError
from toolkit.patching import weight_version
from toolkit.training.conversations import Conversation, Conversations
from toolkit.training.corpus import digest
from toolkit.training.examples import Stream, check_misses
from toolkit.training.objectives.base import RunContext
from toolkit.training.progress import count_shown
from toolkit.training.prompts import Prompts
from toolkit.training.tasks.base import imported

BLOCK_SIZE = 16
C = TypeVar("C", bound=Completion)
_DELTAS_TO_STOP = 32
"""After so many deltas the processes of a split model ask each other whether to stop."""


class Rollout:
    """Generates with the weights as they are. The first call makes the engine; its state is bounded by the recipe.

    Args:
        context: of the run.
        section: of the recipe.
        enable_return_routed_experts: whether completions have ``routed_experts``.
        enable_return_selected_keys: whether they have ``selected_keys``.
    """

    def __init__(
        self,
        context: RunContext,
        section: RolloutSection,
        *,
        enable_return_routed_experts: bool = False,
        enable_return_selected_keys: bool = False,
    ) -> None:
        self._context, self._section = context, section
        self._form = StructuredOutputsParams.read(section.structured_outputs)
        self._return_routed_experts = enable_return_routed_experts
        self._return_selected_keys = enable_return_selected_keys
        self._engine: Engine | None = None
        self._conversations: Conversations | None = None
        self.seconds, self.tokens = 0.0, 0

    @property
    def max_completion_length(self) -> int:
        """Tokens of the longest completion, of all turns together."""
        return self._section.max_completion_length

    @property
    def max_prompt_length(self) -> int:
        """Tokens of the longest prompt that leaves room for a completion."""
        return self._context.recipe.train.max_length - self._section.max_completion_length

    @property
    def engine(self) -> Engine:
        """The engine, made when first asked for."""
        if self._engine is None:
            section, longest = self._section, self._context.recipe.train.max_length
            drafts = section.speculative_config
            memory = section.memory_tokens or section.max_num_seqs * longest
            arguments: dict[str, Any] = {
                "max_num_seqs": section.max_num_seqs,
                "max_num_batched_tokens": max(2048, section.max_num_seqs),
                "max_model_len": longest,
                "block_size": BLOCK_SIZE,
                "num_blocks": max(math.ceil(memory / BLOCK_SIZE), math.ceil(longest / BLOCK_SIZE)),
                "enable_return_routed_experts": self._return_routed_experts,
                "enable_return_selected_keys": self._return_selected_keys,
                "speculative_config": None if drafts is None else drafts.model_dump(),
                "seed": 0,
            }
            made = self._context.model.model, self._context.tokenizer
            if section.engine is None:
                self._engine = Engine(*made, **arguments)
            else:
                self._engine = _engine_elsewhere(section.engine)(*made, **arguments)
        return self._engine

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], n: int = 1, temperature: float | None = None
    ) -> list[list[Completion]]:
        """``n`` completions of each prompt, which depend on the weights and the prompt's seed alone.

        Args:
            prompts: token ids of each.
            seeds: one per prompt.
            n: completions per prompt.
            temperature: in the place of the recipe's.

        Raises:
            ToolkitError: a prompt that is too long, or a completion that failed.
            Interrupted: a signal asked some process to stop, in all of them; the weights are what they were.
        """
        begun = time.perf_counter()
        for prompt in prompts:
            self.check_prompt(prompt)
        params = [self.params(seed, n, temperature) for seed in seeds]
        with self._context.gathered():
            completions = self._run(list(prompts), params) if prompts else []
        self._finish(begun, completions)
        for one in completions:
            if one.error is not None:
                raise ToolkitError(f"a rollout failed: {one.error.rstrip('.')}.")
        return [completions[at : at + n] for at in range(0, len(completions), n)]

    def converse(
        self, prompts: Prompts, problems: Sequence[Any], seeds: Sequence[int], n: int, temperature: float | None = None
    ) -> list[list[Conversation]]:
        """``n`` conversations of each problem with the environment of ``prompts``; otherwise as ``generate``."""
        if self._section.engine is not None:
            name = self._section.engine.get("name")
            raise ToolkitError(
                f"objective.rollout.engine must be null with conversations of several turns, got {name!r}."
            )
        begun = time.perf_counter()
        with self._context.gathered():
            if self._conversations is None:
                self._conversations = Conversations(self, prompts, prompts.max_turns, prompts.episode_timeout)
            groups = self._conversations.hold(problems, seeds, n, temperature)
        self._finish(begun, [one for group in groups for one in group])
        return groups

    def timed(self, make: Callable[[], list[list[C]]]) -> list[list[C]]:
        """The completions that ``make`` returns, of each problem, counted as those of ``generate``."""
        begun = time.perf_counter()
        with self._context.gathered():
            groups = make()
        self._finish(begun, [one for group in groups for one in group])
        return groups

    @property
    def weight_version(self) -> int:
        """Of the weights, as an engine on them counts."""
        return (
            weight_version(self._context.model.model)
            if self._engine is None
            else int(self._engine.stats()["weight_version"])
        )

    def params(self, seed: int, n: int, temperature: float | None, used: int = 0, **given: Any) -> SamplingParams:
        """How completions are sampled.

        Args:
            seed: of the request.
            n: completions.
            temperature: in the place of the recipe's.
            used: tokens that a completion has from earlier turns.
            given: further fields.
        """
        section = self._section
        return SamplingParams(
            n=n,
            max_tokens=section.max_completion_length - used,
            temperature=section.temperature if temperature is None else temperature,
            seed=seed,
            structured_outputs=self._form,
            stop=section.stop,
            **given,
        )

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raise ToolkitError for a prompt that leaves no room for a completion."""
        longest, completion = self.max_prompt_length, self._section.max_completion_length
        if len(prompt) > longest:
            raise ToolkitError(
                f"a prompt must have <= {longest} tokens with train.max_length {longest + completion} and "
                f"objective.rollout.max_completion_length {completion}, got {len(prompt)}."
            )

    def note_blocks(self) -> None:
        """Keep the blocks of this process's engine for the step's details."""
        if self._section.engine is None:
            self._context.details.add_blocks(self.engine)

    @property
    def stopping(self) -> bool:
        """Whether a signal asked this process to stop."""
        return self._context.stop.requested

    def _finish(self, begun: float, completions: Sequence[Completion]) -> None:
        """Count what was sampled. Raises Interrupted, in all processes, where a signal asked one of them to stop."""
        if self._context.reduce_max(int(self._context.stop.requested)):
            raise self._context.stop.interruption()
        self.seconds += time.perf_counter() - begun
        self.tokens += sum(len(one.logprobs) for one in completions)

    def _run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Completion]:
        """What ``engine.generate`` returns, or the part of it that was there when a signal asked to stop."""
        found: dict[tuple[int, int], Completion] = {}
        deltas = cast(Generator[Delta, None, None], self.engine.stream(prompts, params))
        sequences, sampled = sum(one.n for one in params), 0
        with closing(deltas), count_shown(sequences, "completions sampled") as done:
            for number, delta in enumerate(deltas):
                sampled += len(delta.token_ids)
                half = 2 * sampled >= sequences * self._section.max_completion_length
                if half or 2 * len(found) >= sequences:
                    self.note_blocks()
                if delta.finished is not None:
                    found[delta.prompt_index, delta.index] = delta.finished
                    done.update(len(found))
                if self._asked_to_stop(number):
                    break
        return [found[at] for at in sorted(found)]

    def _asked_to_stop(self, number: int) -> bool:
        """Whether a signal asked to stop: at the same delta in all processes where the model is split over them."""
        if not self._context.same_data:
            return self.stopping
        return number % _DELTAS_TO_STOP == 0 and bool(self._context.reduce_max(int(self.stopping)))

    def close(self) -> None:
        """Free the engine's memory; a later call makes another one."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _engine_elsewhere(fields: Mapping[str, Any]) -> Callable[..., Engine]:
    """What makes the engine that ``fields["name"]`` names, with the other fields among its arguments."""
    options = dict(fields)
    name, field = options.pop("name", None), "objective.rollout.engine.name"
    if not isinstance(name, str):
        raise ToolkitError(f"{field} must be a class to import, such as infer_patches.ray:RayEngine, got {name!r}.")
    kind = imported(name, field, "a class")

    def made(*arguments: Any, **given: Any) -> Engine:
        engine: Engine = kind(*arguments, **given | options)
        return engine

    return made


def problems_that_fit(
    token_ids_of: Callable[[Any], list[int]], stream: Stream, count: int, longest: int
) -> tuple[list[Any], list[list[int]], int]:
    """The next problems whose prompts have at most ``longest`` tokens, those prompts, and how many were passed over."""
    problems: list[Any] = []
    token_ids: list[list[int]] = []
    dropped, misses = 0, 0
    while len(problems) < count:
        (problem,) = stream.take(1)
        ids = token_ids_of(problem)
        if len(ids) <= longest:
            problems.append(problem)
            token_ids.append(ids)
            misses = 0
        else:
            dropped, misses = dropped + 1, misses + 1
            check_misses(misses)
    return problems, token_ids, dropped


def eval_completions(
    context: RunContext,
    rollout: Rollout,
    prompts: Prompts,
    most: int,
    filter_overlong_prompts: bool = False,
    token_ids_of: Callable[[Any], list[int]] | None = None,
    seen: Callable[[Sequence[Any], Sequence[Sequence[Completion]]], None] | None = None,
) -> dict[str, Any]:
    """Held-out problems, answered greedily and by one sample at temperature 1.

    Of a task the share that is solved, else the mean reward, and that of each function. The problems and the seeds of
    the samples are always the same ones. The processes share the work.

    Args:
        most: problems.
        filter_overlong_prompts: pass over problems whose prompt is too long.
        token_ids_of: of a problem, what fits is judged by; None for its prompt.
        seen: is given this process's problems and their sampled completions.
    """
    stream, count = prompts.held_out(most)
    if not count:
        return {"eval_samples": 0}
    if filter_overlong_prompts:
        problems = problems_that_fit(token_ids_of or prompts.token_ids, stream, count, rollout.max_prompt_length)[0]
    else:
        problems = stream.take(count)
    mine = list(enumerate(problems))[context.rank :: context.world_size]
    token_ids = [prompts.token_ids(problem) for _, problem in mine]
    seeds = [digest(f"held out/{at}") for at, _ in mine]
    begun = time.perf_counter()
    found: dict[str, Any] = {"eval_samples": count}
    for how, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        completions = prompts.roll_out(rollout, [problem for _, problem in mine], token_ids, seeds, 1, temperature)
        if seen is not None and how == "sampled":
            seen([problem for _, problem in mine], completions)
        judged = context.agreed(partial(prompts.judge, [problem for _, problem in mine], completions))
        values = [value for group in judged.rewards for value in group]
        if prompts.solvable:
            (solved,) = context.reduce_sum([sum(value >= 1.0 for value in values)])
            found[f"eval_accuracy_{how}"] = solved / count
            continue
        found["eval_reward" if how == "sampled" else "eval_reward_greedy"] = _mean(context, values)
        if how == "sampled":
            found |= {f"eval_rewards/{name}/mean": _mean(context, given) for name, given in judged.by_function.items()}
    found["eval_runtime"] = round(time.perf_counter() - begun, 1)
    return found


def _mean(context: RunContext, values: Sequence[float]) -> float:
    """Over all processes, of those that are no NaN."""
    known = [value for value in values if not math.isnan(value)]
    total, count = context.reduce_sum([sum(known), len(known)])
    return total / count if count else math.nan


def show_completions(before: dict[str, Any] | None, after: dict[str, Any]) -> None:
    """Print the measure of completions of held-out problems before and after."""
    for name, how in (("eval_accuracy_sampled", "sampled at temperature 1"), ("eval_accuracy_greedy", "greedy")):
        if name in after:
            start = f"{before[name]:.1%} before, " if before else ""
            print(f"held-out problems solved, {how}: {start}{after[name]:.1%} after ({after['eval_samples']} problems)")
    for name, how in (("eval_reward", "sampled at temperature 1"), ("eval_reward_greedy", "greedy")):
        if name in after:
            start = f"{before[name]:.3f} before, " if before else ""
            print(f"held-out prompts, mean reward, {how}: {start}{after[name]:.3f} after ({after['eval_samples']})")
