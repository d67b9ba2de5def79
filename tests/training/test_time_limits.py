"""Limits of environments in seconds: of an answer, of a tool, of a step's conversations."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.objective_recipes import LOWER, objective_recipe
from toolkit.errors import ToolkitError
from toolkit.training.background_loop import LOOP
from toolkit.training.environments import Environment, ToolEnvironment
from toolkit.training.environments.base import within
from toolkit.training.loop import Trainer
from toolkit.training.timed_call import called_within

HERE = "tests.training.test_time_limits"
ROLLOUT = {"max_completion_length": 24, "max_num_seqs": 16, "stop": [chr(at) for at in range(33, 80)]}


class Slow(Environment):
    """Its answer to every second conversation does not come in time; a plain one, or an asynchronous one."""

    max_turns = 3

    def __init__(self, plain: bool) -> None:
        self._plain = plain

    def env_response(self, messages: Any, state: dict[str, Any]) -> Any:
        late = state["seed"] % 2 == 0
        if self._plain:
            while late:  # code in Python ends when its time is over
                time.sleep(0.01)
            return " go "
        return self._later(late)

    async def _later(self, late: bool) -> str:
        await asyncio.sleep(60.0 if late else 0.0)
        return " go "


def conversations(folder: Path, environment: dict[str, Any], **fields: Any) -> list[Any]:
    given = {
        "task": LOWER,
        "prompts": 4,
        "num_generations": 2,
        "environment": environment,
        "rollout": ROLLOUT,
        **fields,
    }
    recipe = objective_recipe(folder, "grpo", given, train={"max_length": 48}, model={"config": {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64,
    }})  # fmt: skip
    objective: Any = Trainer(recipe, quiet=True).objective
    objective.begin()
    _, groups = objective.roll_out(0, 2)
    return [one for group in groups for one in group]


@pytest.mark.parametrize("plain", [False, True])
def test_a_response_that_takes_too_long_drops_its_conversation(plain: bool, tmp_path: Path) -> None:
    begun = time.monotonic()
    found = conversations(tmp_path, {"name": f"{HERE}:Slow", "plain": plain}, environment_timeout=0.3)
    assert time.monotonic() - begun < 30
    asked = [one for one in found if one.turns > 1 or one.error is not None]
    late = [one for one in asked if one.error is not None]
    assert late
    assert len(late) < len(asked)
    for one in asked:
        assert (one.error is not None) == (one.state["seed"] % 2 == 0)
    assert {one.error for one in late} == {
        "TimeoutError: it took longer than objective.environment_timeout, which is 0.3 seconds"
    }


class Patient(Environment):
    max_turns = 50

    async def env_response(self, messages: Any, state: dict[str, Any]) -> str:
        await asyncio.sleep(0.05)
        return "."


def test_conversations_of_a_step_end_after_their_time(tmp_path: Path) -> None:
    found = conversations(tmp_path, {"name": f"{HERE}:Patient"}, episode_timeout=0.01)
    assert any(one.finish_reason == "timeout" for one in found)
    for one in found:
        assert one.error is None
        assert one.finish_reason != "timeout" or one.sampled[-1]  # it ends with a turn of the model


def busy(seconds: float) -> str:
    """Waits.

    Args:
        seconds: how long.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.005)
    return "done"


def test_a_model_is_told_of_a_tool_that_takes_too_long() -> None:
    environment = ToolEnvironment([busy])
    environment.timeout = 0.2
    state = {"functions": {"busy": busy}, "tool_calls": 0, "tool_failures": 0}
    calls = [
        {"id": str(at), "function": {"name": "busy", "arguments": f'{{"seconds": {seconds}}}'}}
        for at, seconds in enumerate((0.0, 60.0))
    ]
    found = LOOP.submit(environment.env_response([{"tool_calls": calls}], state)).result(30)
    assert found[0]["content"] == "done"
    assert "it took longer than objective.environment_timeout" in found[1]["content"]
    assert state["tool_failures"] == 1


def test_plain_functions_run_one_at_a_time_and_errors_are_their_own() -> None:
    running: list[int] = []

    def alone() -> int:
        running.append(1)
        time.sleep(0.02)
        most = len(running)
        running.pop()
        return most

    async def several() -> list[int]:
        return list(await asyncio.gather(*(within(5.0, alone) for _ in range(4))))

    assert LOOP.submit(several()).result(30) == [1, 1, 1, 1]

    async def own() -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        LOOP.submit(called_within(5.0, "a field", own)).result(30)


def test_a_limit_needs_an_environment(tmp_path: Path) -> None:
    for name in ("environment_timeout", "episode_timeout"):
        with pytest.raises(ToolkitError, match=rf"objective\.{name} must be null without objective\.environment"):
            objective_recipe(tmp_path, "grpo", {"task": LOWER, name: 1.0})
