"""Where the objectives that roll out have their prompts from, and what judges completions: a task, or lines."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.config.objective import OnPolicySection
from toolkit.errors import ToolkitError
from toolkit.training import formats
from toolkit.training.conversations import Conversation
from toolkit.training.environments import Environment, make_environment
from toolkit.training.examples import Stream
from toolkit.training.reward_functions import Failures, RewardFunctions

if TYPE_CHECKING:
    from toolkit.engine.outputs import Completion
    from toolkit.training.rollout import Rollout


class Judged(NamedTuple):
    """Rewards of the completions of each problem.

    Args:
        rewards: of each problem's completions; NaN where there is none.
        by_function: of each function, by its label, those of all completions, problem after problem.
        failures: of each function, by its label, what it failed for.
    """

    rewards: list[list[float]]
    by_function: Mapping[str, list[float]]
    failures: Mapping[str, Failures]


class Prompts(ABC):
    """Problems: each has a prompt.

    Attributes:
        fingerprint: of the data.
        solvable: whether a reward of 1 is a problem that is solved.
        functions: which judge, where the recipe or the environment has some.
        environment: that answers completions, where there is one.
        max_turns: most turns of a conversation with it.
        episode_timeout: seconds after which no further turn is asked for.
        tokenizer: what makes tokens; ``bind`` sets it.
        chat_template_kwargs: variables of the chat template.
    """

    fingerprint: str
    solvable: bool = False
    functions: RewardFunctions | None = None
    environment: Environment | None = None
    max_turns: int = 1
    episode_timeout: float | None = None
    tokenizer: Any
    chat_template_kwargs: Mapping[str, Any] | None = None

    def _take_environment(self, section: OnPolicySection) -> None:
        """The environment of a section, and the functions of both."""
        names = section.reward_funcs
        self.functions = RewardFunctions.load(names, section.reward_weights, section.reward_timeout) if names else None
        self.environment = make_environment(
            getattr(section, "environment", None),
            getattr(section, "environment_factory", None),
            getattr(section, "tools", ()),
        )
        if self.environment is None:
            return
        self.max_turns = getattr(section, "max_turns", None) or self.environment.max_turns
        self.environment.timeout = getattr(section, "environment_timeout", None)
        self.episode_timeout = getattr(section, "episode_timeout", None)
        own = self.environment.reward_functions()
        if own:
            given = self.functions or RewardFunctions([], [], [], section.reward_timeout)
            self.functions = RewardFunctions(
                [*given.names, *(name for name, _, _ in own)],
                [*given.functions, *(function for _, function, _ in own)],
                [*(given.weights or ()), *(weight for _, _, weight in own)],
                section.reward_timeout,
            )

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
    def prompt(self, problem: Any) -> Any:
        """The prompt: a text, or messages."""

    @abstractmethod
    def columns(self, problem: Any) -> dict[str, Any]:
        """What reward functions and environments get of a problem beside its prompt."""

    @abstractmethod
    def encode(self, prompt: Any, problem: Any) -> list[int]:
        """The tokens of a prompt, which may be another than the problem's own."""

    @abstractmethod
    def text(self, problem: Any) -> str:
        """The prompt as text, to show."""

    @abstractmethod
    def with_completion(self, problem: Any) -> tuple[Any, Any]:
        """The prompt and the data's own completion of it, texts or messages."""

    @abstractmethod
    def hint(self, problem: Any) -> str:
        """What a teacher alone sees beside the prompt."""

    def options(self, problem: Any) -> formats.Options:
        """What a problem gives to the chat template."""
        return formats.Options(None, None)

    def token_ids(self, problem: Any) -> list[int]:
        """The prompt's tokens."""
        return self.encode(self.prompt(problem), problem)

    def roll_out(
        self,
        rollout: "Rollout",
        problems: Sequence[Any],
        token_ids: Sequence[list[int]],
        seeds: Sequence[int],
        n: int,
        *temperature: float,
    ) -> "Sequence[Sequence[Completion]]":
        """``n`` completions of each problem, or conversations with the environment.

        Args:
            token_ids: of each problem's prompt.
            temperature: in the place of the recipe's.
        """
        if self.environment is None:
            return rollout.generate(token_ids, seeds, n, *temperature)
        return rollout.converse(self, problems, seeds, n, *temperature)

    def judge(self, problems: Sequence[Any], completions: "Sequence[Sequence[Completion]]") -> Judged:
        """The rewards of completions, a sequence of them for each problem.

        Raises:
            ToolkitError: the environment has raised for all completions since the run began, or as ``RewardFunctions``.
        """
        pairs = [(problem, one) for problem, group in zip(problems, completions) for one in group]
        failures = {} if self.environment is None else {"environment": Failures()}
        for _, one in pairs:
            if one.error is not None:
                failures["environment"].add(f"the environment raised {one.error}")
        if pairs and failures and failures["environment"].count == len(pairs) and not self._answered:
            raise ToolkitError(f"{failures['environment'].first}; it has not worked for any completion yet.")
        self._answered |= any(one.error is None for _, one in pairs)
        known = [at for at, (_, one) in enumerate(pairs) if one.error is None]
        totals = [math.nan] * len(pairs)
        by_function: dict[str, list[float]] = {}
        if self.functions is None:
            for at in known:
                totals[at] = self.own_reward(*pairs[at])
        else:
            found = self.functions(*self._arguments([pairs[at] for at in known]))
            for at, total in zip(known, found.totals):
                totals[at] = total
            for name, values, failed in zip(self.functions.names, found.by_function, found.failures):
                of_all = dict(zip(known, values))
                by_function[name] = [of_all.get(at, math.nan) for at in range(len(pairs))]
                failures[name] = failed
        ends = list(accumulate((len(group) for group in completions), initial=0))
        return Judged([totals[a:b] for a, b in pairwise(ends)], by_function, failures)

    _answered = False

    def own_reward(self, problem: Any, completion: "Completion") -> float:
        """The reward of a completion where no functions judge."""
        raise ToolkitError(
            "objective.reward_funcs must be given for objective.data_files and objective.datasets with an environment "
            "that does not judge, got none."
        )

    def _arguments(
        self, pairs: "Sequence[tuple[Any, Completion]]"
    ) -> tuple[list[Any], list[Any], list[list[int]], list[dict[str, Any]]]:
        """What reward functions get of completions."""
        prompts, said, columns = [], [], []
        for problem, one in pairs:
            prompt, own = self.prompt(problem), self.columns(problem)
            if isinstance(one, Conversation):
                prompt = one.state["prompt"]
                said.append(one.messages)
                own = {**own, "states": one.state}
                if "environment" in one.state:
                    own["environments"] = one.state["environment"]
            else:
                said.append(one.text if isinstance(prompt, str) else [{"role": "assistant", "content": one.text}])
                own = {**own, **getattr(one, "columns", {})}  # of a rollout_func
            prompts.append(prompt)
            columns.append(own)
        return prompts, said, [one.token_ids for _, one in pairs], columns

    def bind(self, tokenizer: Any) -> None:
        """Take what makes tokens."""
        self.tokenizer = tokenizer

    def begin_step(self, step: int, max_steps: int) -> None:
        """Tell reward functions which step (counted from 0) is to come."""
        if self.functions is not None:
            state = self.functions.trainer_state
            state.global_step, state.max_steps = step, max_steps

    def take_logged(self) -> Mapping[str, list[float]]:
        """Metrics that reward functions have logged since the last call."""
        return {} if self.functions is None else self.functions.take_logged()

    def num_lines(self) -> int:
        """Lines to train on. Raises ToolkitError for a task, which has no end."""
        raise ToolkitError("train.num_train_epochs must be null with objective.task.")
