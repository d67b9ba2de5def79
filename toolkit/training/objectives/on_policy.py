"""What the objectives that roll out share: a task's prompts, the engine, metrics of rollouts, eval accuracy."""

import math
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from toolkit.config import Recipe
from toolkit.config.objective import OnPolicySection
from toolkit.errors import ToolkitError
from toolkit.training.corpus import digest
from toolkit.training.objectives.base import (
    CHECKED_PROBLEMS,
    MetricAccumulator,
    Metrics,
    Objective,
    RunContext,
    divided,
)
from toolkit.training.prompts import make_prompts
from toolkit.training.tokenizer import set_chat_template

if TYPE_CHECKING:
    from toolkit.engine.outputs import Completion

P = TypeVar("P", bound=OnPolicySection)


class OnPolicyObjective(Objective[P]):
    """An objective that trains on completions of a task's or of lines' prompts, sampled from the live weights."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.prompts = make_prompts(recipe)
        self.fingerprint = self.prompts.fingerprint

    @property
    def eval_metric(self) -> str:  # type: ignore[override]
        return "eval_accuracy_sampled" if self.prompts.solvable else "eval_reward"

    def describe(self) -> str:
        return self.prompts.describe()

    def texts(self) -> Iterable[str]:
        return self.prompts.texts()

    def bind(self, context: RunContext) -> None:
        from toolkit.training.rollout import Rollout

        super().bind(context)
        set_chat_template(context.tokenizer, self.section.chat_template)
        self.prompts.bind(context.tokenizer)
        self.stream = self.prompts.stream(context.rank, context.world_size)
        self.rollout = Rollout(
            context,
            self.section.rollout,
            enable_return_routed_experts=getattr(self.section, "replay_routing", False),
            enable_return_selected_keys=getattr(self.section, "replay_selection", False),
        )
        self.sums = MetricAccumulator()
        self.prompts_per_step = divided("objective.prompts", self.section.prompts, context.world_size)
        self.trained_tokens = 0
        self._check_prompts()
        self._said_unscored = False

    def num_steps(self, epochs: float) -> int:
        """Steps of so many passes over the lines."""
        return max(math.ceil(epochs * self.prompts.num_lines() / self.section.prompts), 1)

    def begin(self) -> None:
        """At the start of a step."""
        self._begun = time.perf_counter()
        self.rollout.seconds, self.rollout.tokens = 0.0, 0

    def roll_out(self, step: int, n: int, attempt: int = 0) -> tuple[list[Any], list[list["Completion"]]]:
        """This process's problems of a step and ``n`` completions of each; samples depend on (seed, step, index)."""
        context = self.context
        problems, prompts = self._next_problems()
        indices = [at * context.world_size + context.rank for at in range(len(problems))]
        seeds = [digest(f"{self.recipe.seed}/{step}/{attempt}/{index}") for index in indices]
        return problems, self.rollout.generate(prompts, seeds, n)

    def _next_problems(self) -> tuple[list[Any], list[list[int]]]:
        """This process's next problems and their prompts, without those that do not fit where the recipe says so."""
        from toolkit.training.rollout import problems_that_fit

        if not self.section.filter_overlong_prompts:
            problems = self.stream.take(self.prompts_per_step)
            return problems, [self.prompts.token_ids(problem) for problem in problems]
        problems, prompts, dropped = problems_that_fit(
            self.prompts, self.stream, self.prompts_per_step, self.rollout.max_prompt_length
        )
        self.sums.add(prompts_dropped=dropped)
        return problems, prompts

    def _check_prompts(self) -> None:
        """Raise ToolkitError where prompts of the first problems do not fit and the recipe does not pass over them."""
        longest = self.rollout.max_prompt_length
        first = self.prompts.stream().take(CHECKED_PROBLEMS)
        lengths = [len(self.prompts.token_ids(problem)) for problem in first]
        long = [length for length in lengths if length > longest]
        if long and (not self.section.filter_overlong_prompts or len(long) == len(lengths)):
            raise ToolkitError(
                f"a prompt must have <= {longest} tokens with train.max_length {self.recipe.train.max_length} and "
                f"objective.rollout.max_completion_length {self.section.rollout.max_completion_length}, got "
                f"{max(long)} in {len(long)} of the first {len(lengths)} problems; raise train.max_length, or pass "
                "over such problems with objective.filter_overlong_prompts=true."
            )

    def count(self, problems: Sequence[Any], completions: Sequence[Sequence["Completion"]]) -> list[list[float]]:
        """The rewards of the completions of each problem, NaN where there is none; they enter the step's metrics."""
        rewards, by_function = self.prompts.judge(problems, completions)
        for name, given in by_function.items():
            known = [value for value in given if not math.isnan(value)]
            self.sums.add(**{f"rewards/{name}": sum(known), f"judged/{name}": len(known)})
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
        self.context.details.add_completions([self.prompts.text(one) for one in problems], completions, rewards)
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
            **({"accuracy": got["solved"] / samples} if self.prompts.solvable else {}),
            **self._by_function(got),
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

    @staticmethod
    def _by_function(got: dict[str, float]) -> dict[str, float]:
        """The mean reward of each function, over the completions that it judges."""
        names = [name.partition("/")[2] for name in got if name.startswith("rewards/")]
        return {
            f"rewards/{name}/mean": got[f"rewards/{name}"] / got[f"judged/{name}"]
            if got[f"judged/{name}"]
            else math.nan
            for name in names
        }

    def evaluate(self) -> Metrics:
        from toolkit.training.rollout import eval_completions

        return eval_completions(
            self.context,
            self.rollout,
            self.prompts,
            self.section.evaluation.max_eval_samples,
            self.section.filter_overlong_prompts,
        )

    def show(self, before: Metrics | None, after: Metrics) -> None:
        from toolkit.training.rollout import show_completions

        show_completions(before, after)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)

    def close(self) -> None:
        self.rollout.close()
