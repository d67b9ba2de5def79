"""What an environment is: it answers a model's turns, says when they are over, and what they were worth.

The names are those of ``verifiers``. An environment stands beside the prompts of a task or of lines; one object serves
all conversations of a run, and what belongs to one of them is in its ``state``.
"""

import asyncio
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from toolkit.chat.tools import Tool
from toolkit.registry import Registry
from toolkit.training.timed_call import called_within

Messages = str | list[dict[str, Any]]
"""A conversation: of a prompt that is a text the text so far, else messages."""
State = dict[str, Any]


@dataclass
class Rubric:
    """Functions that judge a conversation when it is over.

    A function is called by the names of its parameters, of ``prompt``, ``completion`` (what follows the prompt),
    ``state`` and the keys of ``state`` (``answer`` and other columns of the line). It may be asynchronous, and returns
    a number, or None where it does not apply. Where it raises, the conversation is dropped and counted.

    Args:
        funcs: the functions.
        weights: of each; None is 1 each.
    """

    funcs: Sequence[Callable[..., Any]] = ()
    weights: Sequence[float] | None = None


class Environment(ABC):
    """Answers to a model's turns. The constructor takes the recipe's ``environment`` fields beside ``name``.

    ``class GuessNumber(Environment, name="guess_number")`` registers one of this package. Methods may be asynchronous
    (``async def``): those of all conversations then wait at the same time, while the engine generates. Plain ones run
    one at a time.

    Attributes:
        max_turns: most turns of the model in a conversation.
        rubric: judges; where it has no functions the recipe's ``reward_funcs`` or its task do.
        tools: that the prompt shows to the model.
        timeout: seconds that one of its answers may take, ``objective.environment_timeout``; None is no bound.
    """

    max_turns: int = 10
    rubric: Rubric = Rubric()
    tools: Sequence[Tool] = ()
    timeout: float | None = None
    bounds_itself: ClassVar[bool] = False
    """Whether its methods see to ``timeout`` themselves."""

    def __init_subclass__(cls, name: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name is not None:
            ENVIRONMENTS.add(name, cls)

    def setup_state(self, state: State) -> Any:
        """Before the first turn. ``state`` has ``prompt``, ``answer``, ``seed`` and the line's columns.

        ``state["prompt"]`` may be changed here; what it is afterwards is the conversation's prompt. ``seed`` is a
        number of the conversation, the same in a run that is resumed.
        """
        return None

    def is_completed(self, messages: Messages, state: State) -> Any:
        """Whether the conversation is over, asked after each turn of the model; ``state["turn"]`` counts them."""
        return False

    @abstractmethod
    def env_response(self, messages: Messages, state: State) -> Any:
        """What follows the model's turn, which is the last of ``messages``: messages, or of a text a text.

        None or nothing ends the conversation. A pair of it and the state is taken too.
        """

    def parse(self, text: str, state: State) -> dict[str, Any]:
        """The model's turn as a message."""
        return {"role": "assistant", "content": text}

    def bind(self, tokenizer: Any) -> tuple[int, ...]:
        """Take the tokenizer before the first conversation; special tokens that ``parse`` needs in the text."""
        return ()

    def reward_functions(self) -> list[tuple[str, Callable[..., Any], float]]:
        """Name, function with TRL's signature and ``states``, and weight of each that judges."""
        weights = self.rubric.weights or [1.0] * len(self.rubric.funcs)
        return [
            (getattr(function, "__name__", type(function).__name__), _of_each(function), weight)
            for function, weight in zip(self.rubric.funcs, weights, strict=True)
        ]


ENVIRONMENTS: Registry[Environment] = Registry("toolkit.training.environments")


async def within(timeout: float | None, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What an environment's method or tool returns. Raises TimeoutError where it takes too long."""
    return await called_within(timeout, "objective.environment_timeout", function, *args, **options)


async def awaited(value: Any) -> Any:
    """The value, or what it waits for."""
    return await value if inspect.isawaitable(value) else value


def _of_each(function: Callable[..., Any]) -> Callable[..., Any]:
    """A rubric's function as one of all completions of a step; what it raises stands in its value's place."""

    async def of_all(prompts: Any, completions: Any, states: Any, **columns: Any) -> list[Any]:
        async def one(prompt: Any, completion: Any, state: State) -> Any:
            given = {**state, "prompt": prompt, "completion": completion, "state": state}
            try:
                return await awaited(_by_name(function, given))
            except (Exception, SystemExit) as error:
                return error

        return await asyncio.gather(*map(one, prompts, completions, states))

    return of_all


def _by_name(function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    parameters = inspect.signature(function).parameters.values()
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        return function(**values)
    return function(**{one.name: values.get(one.name) for one in parameters})
