"""Tasks of the package ``reasoning-gym``, by the names of its datasets: ``reasoning_gym:basic_arithmetic``."""

from collections.abc import Mapping
from typing import Any

from toolkit.errors import ToolkitError, first_line
from toolkit.training.tasks.base import Problem, Task


class ReasoningGym(Task, name="reasoning_gym"):
    """Problems that a dataset of reasoning-gym makes from a seed, and its own score. Nothing is downloaded.

    Args:
        dataset: its name, which stands behind ``reasoning_gym:`` in ``objective.task.name``.
        config: fields of the dataset's configuration, without ``seed`` and ``size``.
        tag: the completion's response is between ``<tag>`` and ``</tag>``, the last of them; null for all of it.
        template: of the prompt; ``{question}`` is the question.

    Raises:
        ToolkitError: the package is not installed, there is no such dataset, or it does not take the configuration.
    """

    takes_variant = "dataset"

    def __init__(
        self,
        dataset: str,
        config: Mapping[str, Any] | None = None,
        tag: str | None = "answer",
        template: str = "{question}\n",
    ) -> None:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ToolkitError(
                f"objective.task.name 'reasoning_gym:{dataset}' needs the package 'reasoning-gym': pip install "
                f"train-infer-toolkit[reasoning] ({first_line(error)})."
            ) from None
        if dataset not in DATASETS:
            near = ", ".join(_near(dataset, DATASETS))
            raise ToolkitError(
                f"objective.task.name must have the name of a dataset of reasoning-gym, such as {near}, got "
                f"'reasoning_gym:{dataset}'."
            )
        if "{question}" not in template:
            raise ToolkitError(f"objective.task.template must have {{question}}, got {template!r}.")
        self._create, self._dataset, self._config = reasoning_gym.create_dataset, dataset, dict(config or {})
        self._tag, self._template = tag, template
        self._made(0, 1)

    def _made(self, seed: int, count: int) -> Any:
        try:
            return self._create(self._dataset, seed=seed % 2**32, size=count, **self._config)
        except (TypeError, ValueError, AssertionError) as error:
            raise ToolkitError(
                f"objective.task.config must have fields of the dataset '{self._dataset}', got {self._config!r} "
                f"({first_line(error)})."
            ) from None

    def make(self, seed: int, count: int) -> list[Problem]:
        made = self._made(seed, count)
        self._scorer = made
        entries = [made[at] for at in range(count)]
        return [
            Problem(
                self._template.replace("{question}", entry["question"]),
                self._written(entry["answer"]),
                self._written(entries[at - 1]["answer"]),
                key=entry["question"],
                entry=entry,
            )
            for at, entry in enumerate(entries)
        ]

    def _written(self, response: Any) -> str:
        return f"{response}" if self._tag is None else f"<{self._tag}>{response}</{self._tag}>"

    def judge(self, problem: Problem, completion: str) -> float | None:
        """The dataset's score; None where its scorer raises, which drops the completion."""
        response: str | None = completion.strip()
        if self._tag is not None:
            _, begun, rest = completion.rpartition(f"<{self._tag}>")
            inner, ended, _ = rest.partition(f"</{self._tag}>")
            response = inner.strip() if begun and ended else None
        try:
            return float(self._scorer.score_answer(response, entry=problem.entry))
        except Exception:  # of any of its datasets, on any text
            return None

    def reward(self, prompt: str, completion: str) -> float | None:
        """None: a score is of a problem, see ``judge``."""
        return None


def _near(name: str, known: Mapping[str, Any]) -> list[str]:
    from difflib import get_close_matches

    return [f"reasoning_gym:{one}" for one in get_close_matches(name, known, 5, 0.3) or sorted(known)[:5]]
