"""Problems of another task, some of them with their answer in the prompt: for a model that is to read hints."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.training.corpus import digest
from toolkit.training.tasks.base import Problem, Task


class Hinted(Task, name="hinted"):
    """A share of a task's problems has the right answer in the prompt.

    Args:
        task: the other task: ``name`` and its own fields.
        share: of the problems that have a hint; which ones is the same for every seed.
        template: their prompt, as ``teacher_prompt_template`` of ``sdft``.
    """

    def __init__(
        self, task: Mapping[str, Any], share: float = 0.5, template: str = "{privileged_context} {prompt}"
    ) -> None:
        from toolkit.training.tasks import make_task

        if not 0.0 <= share <= 1.0:
            raise ToolkitError(f"objective.task.share must be >= 0 and <= 1, got {share!r}.")
        self._task, self._share, self._template = make_task(dict(task)), share, template

    def make(self, seed: int, count: int) -> list[Problem]:
        return [self._made(one) for one in self._task.make(seed, count)]

    def _made(self, problem: Problem) -> Problem:
        if digest(f"hinted/{problem.key}") >= self._share * 2**64:
            return replace(problem, entry=problem)
        prompt = self._template.format(prompt=problem.prompt, privileged_context=problem.solution.strip())
        return replace(problem, prompt=prompt, entry=problem)

    def reward(self, prompt: str, completion: str) -> float | None:
        return self._task.reward(prompt, completion)

    def judge(self, problem: Problem, completion: str) -> float | None:
        return self._task.judge(problem.entry, completion)
