"""Prompts of a task, and of lines."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.chat import render
from toolkit.chat.tokens import encode
from toolkit.config import Recipe
from toolkit.config.objective import OnPolicySection
from toolkit.errors import ToolkitError
from toolkit.training import formats
from toolkit.training.conversations import Conversation
from toolkit.training.examples import Stream, prompt_ids
from toolkit.training.given import open_lines
from toolkit.training.jsonl import Line
from toolkit.training.objectives.base import task_texts
from toolkit.training.prompts import Prompts
from toolkit.training.tasks import ProblemStream, Task, checked_reward, make_task

if TYPE_CHECKING:
    from toolkit.engine.outputs import Completion


class TaskPrompts(Prompts):
    """Problems of a task, which judges completions.

    Args:
        task: the task.
        fields: of the recipe.
        seed: of the recipe.
        val_set_size: share of the problems that is held out.
        section: with the environment, where there is one.
    """

    solvable = True

    def __init__(
        self,
        task: Task,
        fields: Mapping[str, Any],
        seed: int,
        val_set_size: float,
        section: OnPolicySection | None = None,
    ) -> None:
        self.task, self._fields, self._seed, self._val_set_size = task, fields, seed, val_set_size
        self.fingerprint = repr(fields)
        if section is not None:
            self._take_environment(section)

    def describe(self) -> str:
        return f"problems of {self._fields}, {self._val_set_size:.0%} of them held out"

    def texts(self) -> Iterable[str]:
        return task_texts(self.task, self._seed, self._val_set_size)

    def stream(self, rank: int = 0, world_size: int = 1) -> Stream:
        return ProblemStream(self.task, self._seed, self._val_set_size, rank=rank, world_size=world_size)

    def held_out(self, most: int) -> tuple[Stream, int]:
        return ProblemStream(self.task, 0, self._val_set_size, held_out=True), most

    def prompt(self, problem: Any) -> str:
        return str(problem.prompt)

    def with_completion(self, problem: Any) -> tuple[str, str]:
        return str(problem.prompt), str(problem.solution)

    def hint(self, problem: Any) -> str:
        return str(problem.solution).strip()

    def columns(self, problem: Any) -> dict[str, Any]:
        return {"answer": problem.solution.strip()}

    def encode(self, prompt: Any, problem: Any) -> list[int]:
        return prompt_ids(self.tokenizer, prompt)

    def text(self, problem: Any) -> str:
        return str(problem.prompt)

    def own_reward(self, problem: Any, completion: "Completion") -> float:
        return checked_reward(self.task, problem, _last_turn(completion))


def _last_turn(completion: "Completion") -> str:
    """The text that a task judges: of a conversation the model's last turn, not what it was told."""
    if not isinstance(completion, Conversation):
        return completion.text
    return str(completion.state["responses"][-1]) if completion.state["responses"] else ""


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

    def follow(self, states: Sequence[dict[str, Any]]) -> None:
        self.load_state_dict(states[0])  # every process reads all of them


class LinePrompts(Prompts):
    """Prompts of lines, texts or messages, and reward functions, which get the lines' other columns.

    Raises:
        ToolkitError: lines that cannot be opened or are no prompts, or functions that cannot be imported.
    """

    def __init__(self, section: OnPolicySection, seed: int) -> None:
        self._section, self._seed = section, seed
        self._take_environment(section)
        self.chat_template_kwargs = section.chat_template_kwargs
        lines = open_lines(section, self._check)
        assert lines is not None
        self._lines = lines
        self.fingerprint = lines.fingerprint

    def _check(self, line: Mapping[str, Any]) -> None:
        """Raise ToolkitError for an object that the objective cannot take."""
        formats.prompt_of(line)
        if self._section.needs_completions:
            formats.prompt_and_completion(line)
        if self._section.needs_hint:
            formats.hint_of(line)

    def own_reward(self, problem: Any, completion: "Completion") -> float:
        return super().own_reward(problem, completion) if self._section.needs_rewards else math.nan

    def describe(self) -> str:
        return f"{len(self._lines.train)} prompts to train on, {len(self._lines.held_out)} held out"

    def texts(self) -> Iterable[str]:
        return (self.text(line) for line in self._lines.train)

    def num_lines(self) -> int:
        return sum(round(count * weight) for count, weight in self._lines.shares)

    def stream(self, rank: int = 0, world_size: int = 1) -> Stream:
        return self._lines.stream(self._seed, rank, world_size)

    def held_out(self, most: int) -> tuple[Stream, int]:
        lines = self._lines.held_out
        return _Listed(lines), min(most, len(lines))

    def bind(self, tokenizer: Any) -> None:
        super().bind(tokenizer)
        first = self.prompt(next(self._lines.firsts()))
        if not isinstance(first, str) and not tokenizer.chat_template:
            raise ToolkitError(
                f"objective.chat_template must be given for messages, as in {self._lines.name}, when the tokenizer "
                "has no template."
            )

    def prompt(self, problem: Line) -> Any:
        return formats.prompt_of(problem.value)

    def with_completion(self, problem: Line) -> tuple[Any, Any]:
        return formats.prompt_and_completion(problem.value)

    def hint(self, problem: Line) -> str:
        return formats.hint_of(problem.value)

    def options(self, problem: Line) -> formats.Options:
        return formats.options(problem.value)

    def columns(self, problem: Line) -> dict[str, Any]:
        own = "prompt" if "prompt" in problem.value else "messages"
        return {name: value for name, value in problem.value.items() if name != own}

    def encode(self, prompt: Any, problem: Line) -> list[int]:
        if isinstance(prompt, str):
            return prompt_ids(self.tokenizer, prompt)
        tools, own = self.options(problem)
        if self.environment is not None and self.environment.tools:
            tools = [tool.for_template() for tool in self.environment.tools]
        variables = {**(self._section.chat_template_kwargs or {}), **(own or {})}
        # A last message of the assistant is continued, as TRL has it.
        opened = prompt[-1].get("role") == "assistant"
        text = render(
            self.tokenizer, prompt, tools, add_generation_prompt=not opened, continue_final_message=opened,
            chat_template_kwargs=variables,
        )  # fmt: skip
        return encode(self.tokenizer, text)

    def text(self, problem: Line) -> str:
        return formats.text_of({"prompt": self.prompt(problem)})


def make_prompts(recipe: Recipe) -> Prompts:
    """What the recipe's objective takes its prompts from."""
    section = recipe.objective
    assert isinstance(section, OnPolicySection)
    if section.task is not None:
        task, share = make_task(section.task), section.evaluation.val_set_size
        return TaskPrompts(task, section.task, recipe.seed, share, section)
    return LinePrompts(section, recipe.seed)
