"""Tools as TRL has them: Python functions, and environments whose methods are tools (``environment_factory``)."""

import asyncio
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

from toolkit.chat.reply import ReplyReading, parse_reply, reading_of
from toolkit.chat.template import template_of
from toolkit.chat.tools import Tool, tool_message
from toolkit.errors import ToolkitError, first_line
from toolkit.training.environments.base import Environment, Messages, State, awaited, within

_NO_TOOLS = ("reset", "get_reward")


class ToolEnvironment(Environment):
    """Runs the calls of the model's turns; one without calls ends the conversation.

    Args:
        functions: tools for all conversations, with type hints and a docstring that describes the arguments, as
            transformers' ``get_json_schema`` reads them.
        factory: makes an object for each conversation, whose public methods are further tools. Its ``reset(**columns)``
            comes first: a text that it returns is appended to the last message of the prompt. Its ``get_reward()``,
            where it has one, is a reward of weight 1.

    Raises:
        ToolkitError: a function or method without such a docstring, or an object without ``reset``.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]] = (), factory: Callable[[], Any] | None = None) -> None:
        self._functions, self._factory = list(functions), factory
        self._kind: type | None = None
        methods: list[Callable[..., Any]] = []
        if factory is not None:
            first = factory()
            self._kind = type(first)
            if not callable(getattr(first, "reset", None)):
                raise ToolkitError(f"objective.environment_factory must make objects with reset, got {self._kind!r}.")
            methods = self._methods(first)
        self.tools = [_tool(one) for one in [*self._functions, *methods]]
        if not self.tools:
            raise ToolkitError("objective.environment_factory must make objects with public methods, got none.")

    @staticmethod
    def _methods(instance: Any) -> list[Callable[..., Any]]:
        names = [name for name, _ in inspect.getmembers(type(instance), inspect.isfunction)]
        return [getattr(instance, name) for name in names if not name.startswith("_") and name not in _NO_TOOLS]

    bounds_itself = True

    def bind(self, tokenizer: Any) -> tuple[int, ...]:
        tools = [tool.for_template() for tool in self.tools]
        self._reading: ReplyReading = reading_of(tokenizer, template_of(tokenizer, None, tools))
        if not self._reading.reads_calls:
            raise ToolkitError(
                "objective.chat_template must be one whose syntax of tool calls is known, for objective.tools and "
                "objective.environment_factory, got another."
            )
        return self._reading.kept_tokens(tokenizer)

    async def setup_state(self, state: State) -> None:
        instance = None if self._factory is None else self._factory()
        state["environment"] = instance
        methods = [] if instance is None else self._methods(instance)
        state["functions"] = {one.__name__: one for one in [*self._functions, *methods]}
        state["tool_calls"] = state["tool_failures"] = 0
        if instance is None:
            return
        observation = await within(self.timeout, instance.reset, **state["columns"])
        if observation is None:
            return
        prompt = state["prompt"]
        if isinstance(prompt, str):
            state["prompt"] = prompt + str(observation)
        else:
            state["prompt"] = [*prompt[:-1], {**prompt[-1], "content": str(prompt[-1]["content"]) + str(observation)}]

    def parse(self, text: str, state: State) -> dict[str, Any]:
        reply = parse_reply(self._reading.parser("", self.tools), text)
        message: dict[str, Any] = {"role": "assistant", "content": reply.content}
        if reply.reasoning is not None:
            message["reasoning_content"] = reply.reasoning
        if reply.calls:
            message["tool_calls"] = [call.for_template() for call in reply.calls]
        return message

    async def env_response(self, messages: Messages, state: State) -> list[dict[str, Any]]:
        last = messages[-1]
        calls = last.get("tool_calls", ()) if isinstance(last, dict) else ()
        return list(await asyncio.gather(*(self._result(call, state) for call in calls)))

    async def _result(self, call: dict[str, Any], state: State) -> dict[str, Any]:
        """The message of a call's result. What goes wrong is a message too, for the model to read."""
        name = call["function"]["name"]
        state["tool_calls"] += 1
        try:
            function = state["functions"].get(name)
            if function is None:
                raise ValueError(f"Tool {name} not found.")
            arguments = json.loads(call["function"]["arguments"] or "{}")
            result = await within(self.timeout, function, **arguments)
        except (Exception, SystemExit) as error:
            state["tool_failures"] += 1
            result = {"error": first_line(error)}
        return tool_message(call["id"], result if isinstance(result, str) else str(result), name)

    def reward_functions(self) -> list[tuple[str, Callable[..., Any], float]]:
        if self._kind is None or not hasattr(self._kind, "get_reward"):
            return []

        async def get_reward(states: Sequence[State], **_: Any) -> list[Any]:
            async def one(state: State) -> Any:
                try:
                    return await awaited(state["environment"].get_reward())
                except (Exception, SystemExit) as error:
                    return error

            return await asyncio.gather(*map(one, states))

        return [(self._kind.__name__, get_reward, 1.0)]


def _tool(function: Callable[..., Any]) -> Tool:
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        schema = get_json_schema(function)["function"]
    except Exception as error:  # of transformers' own classes
        name = getattr(function, "__name__", repr(function))
        raise ToolkitError(
            f"a tool must have type hints and a docstring that describes its arguments, got {name} "
            f"({first_line(error)})."
        ) from None
    return Tool(schema["name"], schema.get("description", ""), schema.get("parameters") or {})
