"""What the objectives that roll out share: a task's prompts, the engine, metrics of rollouts, eval accuracy."""

import math
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from toolkit.config import Recipe
from toolkit.config.objective import OnPolicySection
from toolkit.errors import ToolkitError
from toolkit.training.corpus import digest
from toolkit.training.examples import prompt_ids
from toolkit.training.objectives.base import (
    CHECKED_PROBLEMS,
    MetricAccumulator,
    Metrics,
    Objective,
    RunContext,
    divided,
    task_texts,
)
from toolkit.training.tasks import Problem, ProblemStream, checked_reward, make_task

if TYPE_CHECKING:
    from toolkit.engine.outputs import Completion

P = TypeVar("P", bound=OnPolicySection)


class OnPolicyObjective(Objective[P]):
    """An objective that trains on completions of a task's prompts, sampled from the live weights."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert self.section.task is not None
        self.task = make_task(self.section.task)
        self.fingerprint = repr(self.section.task)

    def describe(self) -> str:
        return f"problems of {self.section.task}, {self.section.evaluation.val_set_size:.0%} of them held out"

    def texts(self) -> Iterable[str]:
        return task_texts(self.task, self.recipe.seed, self.section.evaluation.val_set_size)

    def bind(self, context: RunContext) -> None:
        from toolkit.training.rollout import Rollout

        super().bind(context)
        share = self.section.evaluation.val_set_size
        self.stream = ProblemStream(
            self.task, self.recipe.seed, share, rank=context.rank, world_size=context.world_size
        )
        self.rollout = Rollout(
            context,
            self.section.rollout,
            enable_return_routed_experts=getattr(self.section, "replay_routing", False),
            enable_return_selected_keys=getattr(self.section, "replay_selection", False),
        )
        self.sums = MetricAccumulator()
        self.prompts = divided("objective.prompts", self.section.prompts, context.world_size)
        self.trained_tokens = 0
        self._check_prompts(share)
        self._said_unscored = False

    def begin(self) -> None:
        """At the start of a step."""
        self._begun = time.perf_counter()
        self.rollout.seconds, self.rollout.tokens = 0.0, 0

    def roll_out(self, step: int, n: int, attempt: int = 0) -> tuple[list[Problem], list[list["Completion"]]]:
        """This process's problems of a step and ``n`` completions of each; samples depend on (seed, step, index)."""
        context = self.context
        problems, prompts = self._next_problems()
        indices = [at * context.world_size + context.rank for at in range(len(problems))]
        seeds = [digest(f"{self.recipe.seed}/{step}/{attempt}/{index}") for index in indices]
        return problems, self.rollout.generate(prompts, seeds, n)

    def _next_problems(self) -> tuple[list[Problem], list[list[int]]]:
        """This process's next problems and their prompts, without those that do not fit where the recipe says so."""
        from toolkit.training.rollout import problems_that_fit

        if not self.section.filter_overlong_prompts:
            problems = self.stream.take(self.prompts)
            return problems, [prompt_ids(self.context.tokenizer, problem.prompt) for problem in problems]
        problems, prompts, dropped = problems_that_fit(self.context, self.rollout, self.stream, self.prompts)
        self.sums.add(prompts_dropped=dropped)
        return problems, prompts

    def _check_prompts(self, share: float) -> None:
        """Raise ToolkitError where prompts of the first problems do not fit and the recipe does not pass over them."""
        longest = self.rollout.max_prompt_length
        first = ProblemStream(self.task, self.recipe.seed, share).take(CHECKED_PROBLEMS)
        lengths = [len(prompt_ids(self.context.tokenizer, problem.prompt)) for problem in first]
        long = [length for length in lengths if length > longest]
        if long and (not self.section.filter_overlong_prompts or len(long) == len(lengths)):
            raise ToolkitError(
                f"a prompt must have <= {longest} tokens with train.max_length {self.recipe.train.max_length} and "
                f"objective.rollout.max_completion_length {self.section.rollout.max_completion_length}, got "
                f"{max(long)} in {len(long)} of the first {len(lengths)} problems; raise train.max_length, or pass "
                "over such problems with objective.filter_overlong_prompts=true."
            )

    def count(self, problems: Sequence[Problem], completions: Sequence[Sequence["Completion"]]) -> list[list[float]]:
        """The rewards of the completions of each problem, NaN where there is none; they enter the step's metrics."""
        rewards = [
            [checked_reward(self.task, p.prompt, one.text) for one in group] for p, group in zip(problems, completions)
        ]
        values = [reward for group in rewards for reward in group if not math.isnan(reward)]
        flat = [one for group in completions for one in group]
        self.sums.add(
            samples=len(flat),
            scored=len(values),
            reward=sum(values),
            squared_reward=sum(value * value for value in values),
            solved=sum(value >= 1.0 for value in values),
            length=sum(len(one.token_ids) for one in flat),
            truncated=sum(one.finish_reason == "length" for one in flat),
            negative_log_likelihood=-sum(sum(one.logprobs) for one in flat),
        )
        self.context.details.add_completions(problems, completions, rewards)
        return rewards

    def take(self) -> dict[str, float]:
        """The step's sums over all processes."""
        training = time.perf_counter() - self._begun - self.rollout.seconds
        self.sums.add(
            rolled=self.rollout.tokens, rollout_seconds=self.rollout.seconds, training_seconds=training, processes=1.0
        )
        return self.sums.take(self.context)

    def metrics(self, got: dict[str, float]) -> dict[str, float]:
        """What every step with rollouts logs.

        The entropy is an estimate: the mean negative log-likelihood of the sampled tokens.
        """
        samples, processes = got["samples"], got["processes"]
        scored = got["scored"]  # rewards of None are in none of their statistics
        mean, variance = math.nan, math.nan
        if scored:
            mean = got["reward"] / scored
            variance = max((got["squared_reward"] - got["reward"] ** 2 / scored) / max(scored - 1, 1), 0.0)
        if scored < samples and not self._said_unscored:
            self._said_unscored = True
            self.context.log(
                f"note: {samples - scored:.0f} of {samples:.0f} completions of a step have no reward (None or NaN) and "
                "no advantage; unscored_fraction has the share of every step"
            )
        return {
            "reward": mean,
            "reward_std": math.sqrt(variance),
            "accuracy": got["solved"] / samples,
            "unscored_fraction": 1.0 - scored / samples,
            "entropy": got["negative_log_likelihood"] / max(got["length"], 1.0),
            "completions/mean_length": got["length"] / samples,
            "truncated_fraction": got["truncated"] / samples,
            "rollout_tokens": int(got["rolled"]),
            "rollout_tokens_per_second": round(got["rolled"] * processes / max(got["rollout_seconds"], 1e-9), 1),
            "training_tokens_per_second": round(
                self.trained_tokens * processes / max(got["training_seconds"], 1e-9), 1
            ),
            "weight_version": self.rollout.engine.stats()["weight_version"],
            **({"prompts_dropped": int(got["prompts_dropped"])} if self.section.filter_overlong_prompts else {}),
        }

    def evaluate(self) -> Metrics:
        from toolkit.training.rollout import eval_accuracy

        evaluation = self.section.evaluation
        return eval_accuracy(
            self.context,
            self.rollout,
            self.task,
            evaluation.max_eval_samples,
            evaluation.val_set_size,
            self.section.filter_overlong_prompts,
        )

    def show(self, before: Metrics | None, after: Metrics) -> None:
        from toolkit.training.rollout import show_accuracy

        show_accuracy(before, after)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)

    def close(self) -> None:
        self.rollout.close()
