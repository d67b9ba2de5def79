"""Where the objectives that roll out have their prompts from, and what judges completions: a task, or lines."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.chat import render
from toolkit.chat.tokens import encode
from toolkit.config import Recipe
from toolkit.config.objective import OnPolicySection
from toolkit.errors import ToolkitError
from toolkit.training import formats
from toolkit.training.examples import Stream, prompt_ids
from toolkit.training.given import open_lines
from toolkit.training.jsonl import Line
from toolkit.training.objectives.base import task_texts
from toolkit.training.reward_functions import RewardFunctions
from toolkit.training.tasks import ProblemStream, Task, checked_reward, make_task

if TYPE_CHECKING:
    from toolkit.engine.outputs import Completion

PROMPT: formats.Format = ("prompt",)


class Judged(NamedTuple):
    """Rewards of the completions of each problem, NaN where there is none, and those of each function by its label."""

    rewards: list[list[float]]
    by_function: Mapping[str, list[float]]


class Prompts(ABC):
    """Problems: each has a prompt.

    Attributes:
        fingerprint: of the data.
        solvable: whether a reward of 1 is a problem that is solved.
    """

    fingerprint: str
    solvable: bool = False

    @abstractmethod
    def describe(self) -> str:
        """A line on the data."""

    @abstractmethod
    def texts(self) -> Iterable[str]:
        """What a tokenizer is trained on, where the recipe names none."""

    @abstractmethod
    def stream(self, rank: int = 0, world_size: int = 1) -> Stream:
        """Endless problems to train on, the share of a process."""

    @abstractmethod
    def held_out(self, most: int) -> tuple[Stream, int]:
        """Problems that are never trained on, and how many of them to measure: at most ``most``."""

    @abstractmethod
    def token_ids(self, problem: Any) -> list[int]:
        """The prompt's tokens."""

    @abstractmethod
    def text(self, problem: Any) -> str:
        """The prompt as text, to show."""

    @abstractmethod
    def judge(self, problems: Sequence[Any], completions: Sequence[Sequence["Completion"]]) -> Judged:
        """The rewards of completions, a sequence of them for each problem."""

    def bind(self, tokenizer: Any) -> None:
        """Take what makes tokens."""
        self._tokenizer = tokenizer

    def num_lines(self) -> int:
        """Lines to train on. Raises ToolkitError for a task, which has no end."""
        raise ToolkitError("train.num_train_epochs must be null with objective.task.")


class TaskPrompts(Prompts):
    """Problems of a task, which judges completions.

    Args:
        task: the task.
        fields: of the recipe.
        seed: of the recipe.
        val_set_size: share of the problems that is held out.
    """

    solvable = True

    def __init__(self, task: Task, fields: Mapping[str, Any], seed: int, val_set_size: float) -> None:
        self.task, self._fields, self._seed, self._val_set_size = task, fields, seed, val_set_size
        self.fingerprint = repr(fields)

    def describe(self) -> str:
        return f"problems of {self._fields}, {self._val_set_size:.0%} of them held out"

    def texts(self) -> Iterable[str]:
        return task_texts(self.task, self._seed, self._val_set_size)

    def stream(self, rank: int = 0, world_size: int = 1) -> Stream:
        return ProblemStream(self.task, self._seed, self._val_set_size, rank=rank, world_size=world_size)

    def held_out(self, most: int) -> tuple[Stream, int]:
        return ProblemStream(self.task, 0, self._val_set_size, held_out=True), most

    def token_ids(self, problem: Any) -> list[int]:
        return prompt_ids(self._tokenizer, problem.prompt)

    def text(self, problem: Any) -> str:
        return str(problem.prompt)

    def judge(self, problems: Sequence[Any], completions: Sequence[Sequence["Completion"]]) -> Judged:
        rewards = [
            [checked_reward(self.task, problem.prompt, one.text) for one in group]
            for problem, group in zip(problems, completions)
        ]
        return Judged(rewards, {})


@dataclass
class _Listed:
    """Some problems as a stream: the first ones."""

    lines: Sequence[Line]
    done: int = 0

    def take(self, count: int) -> list[Any]:
        taken = [self.lines[(self.done + at) % len(self.lines)] for at in range(count)]
        self.done += count
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


class LinePrompts(Prompts):
    """Prompts of lines, texts or messages, and reward functions, which get the lines' other columns.

    Raises:
        ToolkitError: lines that cannot be opened or are no prompts, or functions that cannot be imported.
    """

    def __init__(self, section: OnPolicySection, seed: int) -> None:
        self._section, self._seed = section, seed
        self.functions = RewardFunctions(section.reward_funcs, section.reward_weights)
        lines = open_lines(section, lambda line: formats.check(line, (PROMPT,)))
        assert lines is not None
        self._lines = lines
        self.fingerprint = lines.fingerprint

    def describe(self) -> str:
        return f"{len(self._lines.train)} prompts to train on, {len(self._lines.held_out)} held out"

    def texts(self) -> Iterable[str]:
        return (formats.text_of(formats.read(line.value, (PROMPT,))) for line in self._lines.train)

    def num_lines(self) -> int:
        return sum(round(count * weight) for count, weight in self._lines.shares)

    def stream(self, rank: int = 0, world_size: int = 1) -> Stream:
        return self._lines.stream(self._seed, rank, world_size)

    def held_out(self, most: int) -> tuple[Stream, int]:
        lines = self._lines.held_out
        return _Listed(lines), min(most, len(lines))

    def bind(self, tokenizer: Any) -> None:
        super().bind(tokenizer)
        first = formats.read(next(self._lines.firsts()).value, (PROMPT,))["prompt"]
        if not isinstance(first, str) and not tokenizer.chat_template:
            raise ToolkitError(
                f"objective.chat_template must be given for messages, as in {self._lines.name}, when the tokenizer "
                "has no template."
            )

    def token_ids(self, problem: Line) -> list[int]:
        prompt = formats.read(problem.value, (PROMPT,))["prompt"]
        if isinstance(prompt, str):
            return prompt_ids(self._tokenizer, prompt)
        tools, own = formats.options(problem.value)
        variables = {**(self._section.chat_template_kwargs or {}), **(own or {})}
        # A last message of the assistant is continued, as TRL has it.
        opened = prompt[-1].get("role") == "assistant"
        text = render(
            self._tokenizer, prompt, tools, add_generation_prompt=not opened, continue_final_message=opened,
            chat_template_kwargs=variables,
        )  # fmt: skip
        return encode(self._tokenizer, text)

    def text(self, problem: Line) -> str:
        return formats.text_of(formats.read(problem.value, (PROMPT,)))

    def judge(self, problems: Sequence[Line], completions: Sequence[Sequence["Completion"]]) -> Judged:
        pairs = [(problem, one) for problem, group in zip(problems, completions) for one in group]
        prompts = [formats.read(problem.value, (PROMPT,))["prompt"] for problem, _ in pairs]
        replies: list[Any] = [
            one.text if isinstance(prompt, str) else [{"role": "assistant", "content": one.text}]
            for prompt, (_, one) in zip(prompts, pairs)
        ]
        columns = [{name: value for name, value in line.value.items() if name != "prompt"} for line, _ in pairs]
        found = self.functions(prompts, replies, [one.token_ids for _, one in pairs], columns)
        rewards, at = [], 0
        for group in completions:
            rewards.append(found.totals[at : at + len(group)])
            at += len(group)
        return Judged(rewards, dict(zip(self.functions.labels, found.by_function)))


def make_prompts(recipe: Recipe) -> Prompts:
    """What the recipe's objective takes its prompts from."""
    section = recipe.objective
    assert isinstance(section, OnPolicySection)
    if section.task is not None:
        return TaskPrompts(make_task(section.task), section.task, recipe.seed, section.evaluation.val_set_size)
    return LinePrompts(section, recipe.seed)
