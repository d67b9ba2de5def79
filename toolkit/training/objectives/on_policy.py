"""What the objectives that roll out share: a task's prompts, the engine, metrics of rollouts, eval accuracy."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
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
from toolkit.training.prompt_sources import make_prompts
from toolkit.training.prompts import Judged
from toolkit.training.tokenizer import set_chat_template

if TYPE_CHECKING:
    from toolkit.engine.outputs import Completion

P = TypeVar("P", bound=OnPolicySection)
TRUNCATED = ("length", "timeout")
"""``finish_reason`` of completions that would have gone on."""


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
        from toolkit.training.rollout_functions import RolloutFunction

        super().bind(context)
        set_chat_template(context.tokenizer, self.section.chat_template)
        self.prompts.bind(context.tokenizer)
        if self.prompts.functions is not None:
            self.prompts.functions.open_models(self.recipe, context.device)
        self.stream = self.prompts.stream(context.rank, context.world_size)
        self.rollout = Rollout(
            context,
            self.section.rollout,
            enable_return_routed_experts=getattr(self.section, "replay_routing", False),
            enable_return_selected_keys=getattr(self.section, "replay_selection", False),
        )
        name = getattr(self.section, "rollout_func", None)
        self.rollout_function = None if name is None else RolloutFunction(name, context, self.prompts)
        self.sums = MetricAccumulator()
        self.prompts_per_step = divided("objective.prompts", self.section.prompts, context.world_size)
        self.trained_tokens = 0
        self._check_prompts()
        self._said: set[str] = set()
        self._failed: dict[str, str] = {}

    def num_steps(self, epochs: float) -> int:
        """Steps of so many passes over the lines."""
        return max(math.ceil(epochs * self.prompts.num_lines() / self.section.prompts), 1)

    def begin(self) -> None:
        """At the start of a step."""
        self._begun = time.perf_counter()
        self.rollout.seconds, self.rollout.tokens = 0.0, 0

    def roll_out(self, step: int, n: int, attempt: int = 0) -> "tuple[list[Any], Sequence[Sequence[Completion]]]":
        """This process's problems of a step and ``n`` completions of each; samples depend on (seed, step, index)."""
        self.prompts.begin_step(step, self.recipe.train.max_steps)
        problems, prompts = self._next_problems()
        if self.rollout_function is not None:
            function = self.rollout_function
            return problems, self.rollout.timed(lambda: function(problems, step))
        seeds = self.seeds(step, len(problems), attempt)
        return problems, self.prompts.roll_out(self.rollout, problems, prompts, seeds, n)

    def seeds(self, step: int, count: int, attempt: int = 0) -> list[int]:
        """Of this process's problems of a step."""
        indices = [at * self.context.world_size + self.context.rank for at in range(count)]
        return [digest(f"{self.recipe.seed}/{step}/{attempt}/{index}") for index in indices]

    def prompt_ids(self, problem: Any) -> list[int]:
        """The tokens that completions of a problem are sampled behind."""
        return self.prompts.token_ids(problem)

    def _next_problems(self) -> tuple[list[Any], list[list[int]]]:
        """This process's next problems and their prompts, without those that do not fit where the recipe says so."""
        from toolkit.training.rollout import problems_that_fit

        if not self.section.filter_overlong_prompts:
            problems = self.stream.take(self.prompts_per_step)
            return problems, [self.prompt_ids(problem) for problem in problems]
        problems, prompts, dropped = problems_that_fit(
            self.prompt_ids, self.stream, self.prompts_per_step, self.rollout.max_prompt_length
        )
        self.sums.add(prompts_dropped=dropped)
        return problems, prompts

    def _check_prompts(self) -> None:
        """Raise ToolkitError where prompts of the first problems do not fit and the recipe does not pass over them."""
        longest = self.rollout.max_prompt_length
        first = self.prompts.stream().take(CHECKED_PROBLEMS)
        lengths = [len(self.prompt_ids(problem)) for problem in first]
        long = [length for length in lengths if length > longest]
        if long and (not self.section.filter_overlong_prompts or len(long) == len(lengths)):
            raise ToolkitError(
                f"a prompt must have <= {longest} tokens with train.max_length {self.recipe.train.max_length} and "
                f"objective.rollout.max_completion_length {self.section.rollout.max_completion_length}, got "
                f"{max(long)} in {len(long)} of the first {len(lengths)} problems; raise train.max_length, or pass "
                "over such problems with objective.filter_overlong_prompts=true."
            )

    def count(self, problems: Sequence[Any], completions: Sequence[Sequence["Completion"]]) -> Judged:
        """What judges the completions of each problem says of them, which enters the step's metrics."""
        judged = self.context.agreed(lambda: self.prompts.judge(problems, completions))
        rewards = judged.rewards
        for name, given in judged.by_function.items():
            known = [value for value in given if not math.isnan(value)]
            self.sums.add(**{f"rewards/{name}": sum(known), f"judged/{name}": len(known)})
        for name, failures in judged.failures.items():
            metric = f"rewards/{name}/failed" if name in judged.by_function else f"{name}/failed"
            self.sums.add(**{f"failed/{metric}": failures.count})
            if failures.count:
                self._failed[metric] = failures.first
        values = [reward for group in rewards for reward in group if not math.isnan(reward)]
        flat = [one for group in completions for one in group]
        self.sums.add(
            samples=len(flat),
            scored=len(values),
            reward=sum(values),
            squared_reward=sum(value * value for value in values),
            solved=sum(value >= 1.0 for value in values),
            length=sum(len(one.logprobs) for one in flat),
            truncated=sum(one.finish_reason in TRUNCATED for one in flat),
            negative_log_likelihood=-sum(sum(one.logprobs) for one in flat),
        )
        if self.prompts.environment is not None:
            states: list[Any] = [getattr(one, "state") for one in flat]  # noqa: B009
            self.sums.add(
                turns=sum(state["turn"] for state in states),
                tool_calls=sum(state.get("tool_calls", 0) for state in states),
                tool_failures=sum(state.get("tool_failures", 0) for state in states),
            )
        self.context.details.add_completions([self.prompts.text(one) for one in problems], completions, rewards)
        return judged

    def _say_once(self, key: str, note: str) -> None:
        """Print a note at the first of its kind."""
        if key not in self._said:
            self._said.add(key)
            self.context.log(f"note: {note}")

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
        if scored < samples and (self.section.needs_rewards or self.section.reward_funcs):
            self._say_once(
                "unscored",
                f"{samples - scored:.0f} of {samples:.0f} completions of a step have no reward and are dropped; "
                "unscored_fraction has the share of every step",
            )
        return {
            "reward": mean,
            "reward_std": math.sqrt(variance),
            **({"accuracy": got["solved"] / samples} if self.prompts.solvable else {}),
            **self._by_function(got),
            **self._logged(),
            "unscored_fraction": 1.0 - scored / samples,
            "entropy": got["negative_log_likelihood"] / max(got["length"], 1.0),
            "completions/mean_length": got["length"] / samples,
            "truncated_fraction": got["truncated"] / samples,
            **self._of_turns(got),
            "rollout_tokens": int(got["rolled"]),
            "rollout_tokens_per_second": round(got["rolled"] * processes / max(got["rollout_seconds"], 1e-9), 1),
            "training_tokens_per_second": round(
                self.trained_tokens * processes / max(got["training_seconds"], 1e-9), 1
            ),
            "weight_version": self.rollout.weight_version,
            **({"prompts_dropped": int(got["prompts_dropped"])} if self.section.filter_overlong_prompts else {}),
        }

    @staticmethod
    def _by_function(got: dict[str, float]) -> dict[str, float]:
        """The mean reward of each function, over the completions that it judges, and how many it failed for."""
        found: dict[str, float] = {}
        for name in [name.partition("/")[2] for name in got if name.startswith("rewards/")]:
            judged = got[f"judged/{name}"]
            found[f"rewards/{name}/mean"] = got[f"rewards/{name}"] / judged if judged else math.nan
        return found | {name.partition("/")[2]: int(count) for name, count in got.items() if name.startswith("failed/")}

    def _of_turns(self, got: dict[str, float]) -> dict[str, float]:
        """Turns and calls of tools, by TRL's names."""
        if self.prompts.environment is None:
            return {}
        calls = got["tool_calls"]
        return {
            "turns/mean": got["turns"] / got["samples"],
            "tools/call_frequency": calls / got["samples"],
            "tools/failure_frequency": got["tool_failures"] / calls if calls else 0.0,
        }

    def _logged(self) -> dict[str, float]:
        """Means of what reward functions have logged, over all processes, which may have logged other names.

        What they failed for is printed, the first time in any process.
        """
        if self.prompts.functions is None and self.prompts.environment is None:
            return {}
        values: dict[str, list[float]] = {}
        for logged, failed in self.context.gather_objects((self.prompts.take_logged(), self._failed)):
            for name, given in logged.items():
                values.setdefault(name, []).extend(given)
            for metric, first in failed.items():
                self._say_once(metric, f"{first}; {metric} counts such completions")
        self._failed = {}
        return {name: sum(given) / len(given) for name, given in sorted(values.items())}

    def evaluate(self) -> Metrics:
        return self.evaluate_completions()

    def evaluate_completions(
        self, seen: "Callable[[Sequence[Any], Sequence[Sequence[Completion]]], None] | None" = None
    ) -> Metrics:
        """The measure of held-out completions; ``seen`` is given the problems and completions that were sampled."""
        from toolkit.training.rollout import eval_completions

        return eval_completions(
            self.context,
            self.rollout,
            self.prompts,
            self.section.evaluation.max_eval_samples,
            self.section.filter_overlong_prompts,
            self.prompt_ids,
            seen,
        )

    def show(self, before: Metrics | None, after: Metrics) -> None:
        from toolkit.training.rollout import show_completions

        show_completions(before, after)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)

    def follow(self, states: Sequence[dict[str, Any]]) -> None:
        self.stream.follow(states)

    def close(self) -> None:
        self.rollout.close()
