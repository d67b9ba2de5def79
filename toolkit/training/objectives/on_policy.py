"""What the objectives that roll out share: a task's prompts, the engine, figures of rollouts, held-out success."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

from toolkit.config import Recipe
from toolkit.engine.outputs import Completion
from toolkit.training.corpus import digest
from toolkit.training.examples import prompt_ids
from toolkit.training.objectives.base import MetricAccumulator, Objective, RunContext, divided, task_texts
from toolkit.training.rollout import Rollout, show_success, success
from toolkit.training.tasks import Problem, ProblemStream, make_task


class OnPolicyObjective(Objective):
    """An objective that trains on completions of a task's prompts, drawn from the live weights."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        section: Any = recipe.objective
        self.section = section
        self.task = make_task(section.task)
        self.fingerprint = repr(section.task)

    def describe(self) -> str:
        return f"problems of {self.section.task}, {self.section.evaluation.held_out:.0%} of them held out"

    def texts(self) -> Iterable[str]:
        return task_texts(self.task, self.recipe.seed, self.section.evaluation.held_out)

    def bind(self, setting: RunContext) -> None:
        super().bind(setting)
        share = self.section.evaluation.held_out
        self.stream = ProblemStream(self.task, self.recipe.seed, share, rank=setting.rank, world=setting.world)
        self.rollout = Rollout(setting, self.section.rollout, getattr(self.section, "replay_routing", False))
        self.sums = MetricAccumulator()
        self.prompts = divided("objective.prompts", self.section.prompts, setting.world)
        self.trained_tokens = 0

    def begin(self) -> None:
        """At the start of a step."""
        self._begun = time.perf_counter()
        self.rollout.seconds, self.rollout.tokens = 0.0, 0

    def roll_out(self, step: int, n: int, attempt: int = 0) -> tuple[list[Problem], list[list[Completion]]]:
        """This process's problems of a step and ``n`` completions of each; draws depend on (seed, step, index)."""
        setting = self.setting
        problems = self.stream.take(self.prompts)
        places = [at * setting.world + setting.rank for at in range(len(problems))]
        seeds = [digest(f"{self.recipe.seed}/{step}/{attempt}/{place}") for place in places]
        prompts = [prompt_ids(setting.tokenizer, problem.prompt) for problem in problems]
        return problems, self.rollout.generate(prompts, seeds, n)

    def count(self, problems: Sequence[Problem], answers: Sequence[Sequence[Completion]]) -> list[list[float]]:
        """The rewards of the answers to each problem; they and the answers enter the step's figures."""
        rewards = [[self.task.reward(p.prompt, a.text) for a in group] for p, group in zip(problems, answers)]
        values = [reward for group in rewards for reward in group]
        flat = [one for group in answers for one in group]
        self.sums.add(
            samples=len(flat),
            reward=sum(values),
            success=sum(value >= 1.0 for value in values),
            length=sum(len(one.token_ids) for one in flat),
            cut=sum(one.finish_reason == "length" for one in flat),
            surprise=-sum(sum(one.logprobs) for one in flat),
        )
        return rewards

    def take(self) -> dict[str, float]:
        """The step's sums over all processes."""
        training = time.perf_counter() - self._begun - self.rollout.seconds
        self.sums.add(
            rolled=self.rollout.tokens, rollout_seconds=self.rollout.seconds, training_seconds=training, processes=1.0
        )
        return self.sums.take(self.setting)

    def figures(self, got: dict[str, float]) -> dict[str, float]:
        """What every step with rollouts logs. The entropy is an estimate: the mean surprise of the tokens drawn."""
        samples, processes = got["samples"], got["processes"]
        return {
            "reward": got["reward"] / samples,
            "success": got["success"] / samples,
            "entropy": got["surprise"] / got["length"],
            "completion_length": got["length"] / samples,
            "cut_fraction": got["cut"] / samples,
            "rollout_tokens": int(got["rolled"]),
            "rollout_tokens_per_second": round(got["rolled"] * processes / max(got["rollout_seconds"], 1e-9), 1),
            "training_tokens_per_second": round(
                self.trained_tokens * processes / max(got["training_seconds"], 1e-9), 1
            ),
            "weight_version": self.rollout.engine.stats()["weight_version"],
        }

    def evaluate(self) -> dict[str, Any]:
        evaluation = self.section.evaluation
        return success(self.setting, self.rollout, self.task, evaluation.problems, evaluation.held_out)

    def show(self, before: dict[str, Any] | None, after: dict[str, Any]) -> None:
        show_success(before, after)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)

    def close(self) -> None:
        self.rollout.close()
