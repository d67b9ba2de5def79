"""Conversations with environments and tools: tokens, masks and log-probabilities of all turns, rewards, failures."""

import asyncio
import json
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.objective_recipes import LOWER, Lower, dense_logprobs, objective_recipe
from tests.helpers.tool_templates import HERMES, LLAMA
from toolkit.chat import render
from toolkit.chat.tokens import encode
from toolkit.errors import ToolkitError
from toolkit.files import write_atomic
from toolkit.strict_json import strict_json
from toolkit.testing.models import tiny_tokenizer
from toolkit.training.background_loop import LOOP
from toolkit.training.conversations import AfterTurn, Conversation
from toolkit.training.environments import Environment, Rubric, ToolEnvironment, make_environment
from toolkit.training.loop import Trainer, train
from toolkit.training.metrics import read_metrics
from toolkit.training.prompt_sources import TaskPrompts
from toolkit.training.prompts import Judged
from toolkit.training.signals import Interrupted

HERE = "tests.training.test_environments"
STOP = [chr(at) for at in range(33, 80)]
ROLLOUT = {"max_completion_length": 40, "max_num_seqs": 16, "stop": STOP}


CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 2048,
}  # fmt: skip


async def ascii_share(completion: str, state: dict[str, Any]) -> float | None:
    await asyncio.sleep(0)
    if state["turn"] == 1:
        return None
    return sum(map(str.isascii, completion)) / max(len(completion), 1)


def turns(state: dict[str, Any]) -> float:
    return float(state["turn"])


class Echo(Environment):
    """Answers with how many turns there were: one asynchronously, one plainly."""

    rubric = Rubric([ascii_share, turns], [1.0, 0.1])

    def __init__(self, max_turns: int = 4, fails_at: int = 99) -> None:
        self.max_turns, self._fails_at = max_turns, fails_at

    def setup_state(self, state: dict[str, Any]) -> None:
        state["prompt"] = state["prompt"] + " ?"

    async def is_completed(self, messages: Any, state: dict[str, Any]) -> bool:
        return state["turn"] == 3 and state["seed"] % 2 == 0

    async def env_response(self, messages: Any, state: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        assert messages.startswith(state["prompt"])
        assert messages.endswith(state["responses"][-1])
        if state["turn"] >= self._fails_at and state["seed"] % 3 == 0:
            raise RuntimeError("the game is broken")
        return f" ({state['turn']}) "


def recipe(folder: Path, fields: dict[str, Any], kind: str = "grpo", **sections: Any) -> Any:
    given = {
        "task": LOWER, "prompts": 3, "num_generations": 4, "environment": f"{HERE}:Echo", "rollout": ROLLOUT, **fields,
    }  # fmt: skip
    train = {"max_length": 160, "batch_tokens": 512, **sections.pop("train", {})}
    model = {"config": CONFIG, **sections.pop("model", {})}
    return objective_recipe(folder, kind, given, train=train, model=model, **sections)


def rolled(policy: Any) -> list[Any]:
    """All conversations of the steps to come."""
    seen: list[Any] = []
    converse = policy.rollout.converse

    def kept(*args: Any) -> Any:
        groups = converse(*args)
        seen.extend(one for group in groups for one in group)
        return groups

    policy.rollout.converse = kept
    return seen


def test_a_task_judges_the_models_last_turn_and_not_what_it_was_told() -> None:
    prompts = TaskPrompts(Lower(), {}, 0, 0.1)
    (problem,) = prompts.stream().take(1)
    one = Conversation(0, 0, 0, [3], [4], [0.0], [0.0], "what it was told", "stop")
    for responses, reward in (([], 0.0), (["aaa", "\u00e9"], 0.0), (["\u00e9", "aaa"], 1.0)):
        one.state = {"responses": responses}
        assert prompts.own_reward(problem, one) == reward


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"loss_type": "dapo", "beta": 0.2, "importance_sampling_clip_max": 1.01}, marks=pytest.mark.sweep),
        pytest.param({"importance_sampling_level": "sequence", "num_iterations": 2}, marks=pytest.mark.sweep),
    ],
)
def test_the_loss_is_that_of_the_sampled_tokens_of_all_turns(tmp_path: Path, fields: dict[str, Any]) -> None:
    """In float64, against a dense forward of each conversation; tokens of the environment count nowhere."""
    trainer = Trainer(recipe(tmp_path, fields, model={"dtype": "float64"}), quiet=True)
    policy: Any = trainer.objective
    seen = rolled(policy)
    micros = next(policy.updates(0))
    loss = torch.zeros((), dtype=torch.float64)
    for micro in micros:
        part = policy.loss(trainer.forward, micro)
        part.backward()
        loss += part.detach()
    ours = {name: p.grad.clone() for name, p in trainer.hf_model.named_parameters() if p.grad is not None}
    trainer.hf_model.zero_grad()
    assert {one.turns for one in seen} >= {3, 4}
    samples = [sample for micro in micros for sample in micro.samples if sample.weight]
    exact, tokens = torch.zeros((), dtype=torch.float64), sum(sum(one.sampled) for one in seen)
    for sample in samples:
        logprob = dense_logprobs(trainer.hf_model, sample.sequence)[-len(sample.tokens) :]
        mask = torch.tensor(sample.sampled)
        counted = logprob[mask]
        torch.testing.assert_close(counted, torch.tensor(sample.behaviour, dtype=torch.float64), rtol=1e-6, atol=1e-6)
        term = -(counted - counted.detach()).exp() * sample.advantage
        if fields.get("importance_sampling_level") == "sequence":
            term = -(counted - counted.detach()).mean().exp().expand(len(counted)) * sample.advantage
        if fields.get("beta"):  # the reference is the same model: its gradient is 0 here
            difference = counted.detach() - counted
            term = term + 0.2 * (difference.exp() - 1 - difference)
        exact = exact + (term.sum() / tokens if fields.get("loss_type") == "dapo" else term.mean() / len(seen))
    exact.backward()
    torch.testing.assert_close(loss, exact.detach(), rtol=1e-6, atol=1e-7)
    for name, parameter in trainer.hf_model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)
    assert policy.finish()[0] == sum(len(sample.behaviour) for sample in samples)


@pytest.mark.parametrize("kind", ["grpo", pytest.param("rloo", marks=pytest.mark.sweep)])
def test_turns_continue_on_their_tokens_and_pages(tmp_path: Path, kind: str) -> None:
    """No token changes between turns, log-probabilities have the bits of training's, pages of earlier turns are hit."""
    trainer = Trainer(recipe(tmp_path, {"beta": 0.1}, kind), quiet=True)
    policy: Any = trainer.objective
    seen, asked = rolled(policy), []
    submit = policy.rollout.engine.submit
    policy.rollout.engine.submit = lambda prompt, params: asked.append(list(prompt)) or submit(prompt, params)
    trainer.train_step()
    assert len(seen) == 12
    tokenizer = trainer.objective.context.tokenizer
    for one in seen:
        whole = [*one.prompt_token_ids, *one.token_ids]
        assert [prompt for prompt in asked if prompt == whole[: len(prompt)]]
        assert len(one.sampled) == len(one.token_ids)
        assert len(one.logprobs) == sum(one.sampled) == len(one.weight_versions)
        said = [token for token, sampled in zip(one.token_ids, one.sampled) if not sampled]
        assert tokenizer.decode(said) == "".join(f" ({turn}) " for turn in range(1, one.turns))
        assert one.sampled[-1]
        assert tokenizer.decode(one.prompt_token_ids).endswith(" ?")
    assert len(asked) == 3 + sum(one.turns - 1 for one in seen)  # the first turns of a group are one request
    assert sum(one.num_cached_tokens for one in seen) > 100
    metrics = policy.finish()[1]
    assert metrics["mismatch_bits"] == 0
    assert metrics["turns/mean"] == sum(one.turns for one in seen) / 12
    assert metrics["completions/mean_length"] == sum(sum(one.sampled) for one in seen) / 12
    means = [one.state["turn"] for one in seen]
    assert metrics["rewards/turns/mean"] == pytest.approx(sum(means) / 12)


def test_the_same_run_has_the_same_conversations(tmp_path: Path) -> None:
    """Though responses come when they come, and with room for three sequences."""
    found = []
    for name, most in (("wide", 16), ("narrow", 3)):
        fields = {"rollout": ROLLOUT | {"max_num_seqs": most}}
        trainer = Trainer(recipe(tmp_path, fields, run_name=name), quiet=True)
        seen = rolled(trainer.objective)
        trainer.train_step()
        found.append([(one.token_ids, one.logprobs, one.sampled) for one in seen])
    assert found[0] == found[1]


def test_a_conversation_whose_environment_raises_is_dropped(tmp_path: Path) -> None:
    fields = {"environment": {"name": f"{HERE}:Echo", "fails_at": 2}}
    trainer = Trainer(recipe(tmp_path, fields), quiet=True)
    policy: Any = trainer.objective
    said: list[str] = []
    object.__setattr__(policy.context, "log", said.append)
    seen = rolled(policy)
    samples = [sample for micro in next(policy.updates(0)) for sample in micro.samples if sample.weight]
    broken = [one for one in seen if one.error]
    assert 0 < len(broken) < 12
    assert all(sample.behaviour != one.logprobs for one in broken for sample in samples)
    assert policy.finish()[1]["environment/failed"] == len(broken)
    assert any(
        "the environment raised RuntimeError: the game is broken; environment/failed counts" in one for one in said
    )
    always = recipe(tmp_path, fields | {"environment": f"{HERE}:Broken"}, run_name="always")
    with pytest.raises(ToolkitError, match=r"the environment raised ValueError: never; it has not worked for any"):
        next(Trainer(always, quiet=True).objective.updates(0))


class Exits(Echo):
    """Ends the program where it should answer."""

    async def env_response(self, messages: Any, state: dict[str, Any]) -> Any:
        async def exits() -> None:
            raise SystemExit(3)

        await asyncio.gather(exits())


class Silent(Echo):
    """Never answers; a signal comes while it is waited for."""

    stop: Any = None

    async def env_response(self, messages: Any, state: dict[str, Any]) -> Any:
        self.stop.accept(signal.SIGTERM)
        await asyncio.Event().wait()


def test_an_environment_that_exits_takes_its_conversations_alone(tmp_path: Path) -> None:
    """What exits ends the loop of asynchronous functions, where the others' would wait for ever."""
    trainer = Trainer(recipe(tmp_path, {"environment": f"{HERE}:Exits"}), quiet=True)
    with pytest.raises(ToolkitError, match=r"the environment raised SystemExit: 3; it has not worked for any"):
        next(trainer.objective.updates(0))
    assert LOOP.submit(asyncio.sleep(0, "here")).result(60) == "here"


def test_a_signal_ends_waiting_for_an_environment(tmp_path: Path) -> None:
    trainer = Trainer(recipe(tmp_path, {"environment": f"{HERE}:Silent"}), quiet=True)
    policy: Any = trainer.objective
    policy.prompts.environment.stop = trainer.stop
    with pytest.raises(Interrupted):
        next(policy.updates(0))


class Broken(Echo):
    def setup_state(self, state: dict[str, Any]) -> None:
        raise ValueError("never")


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


async def slow_word(word: str) -> str:
    """Say a word.

    Args:
        word: to say.
    """
    await asyncio.sleep(0)
    if not word:
        raise ValueError("no word")
    return word


class Counter:
    """TRL's kind of environment: a number that the tools change."""

    def reset(self, **columns: Any) -> str:
        self.value = columns["start"]
        return f" It is {self.value}."

    def increment(self, step: int) -> str:
        """Increment the number.

        Args:
            step: by how much.
        """
        self.value += step
        return f"now {self.value}"

    async def get_reward(self) -> float:
        return float(self.value)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def bound(environment: ToolEnvironment) -> ToolEnvironment:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = HERMES
    environment.bind(tokenizer)
    return environment


def test_tools_are_called_and_what_goes_wrong_is_a_message() -> None:
    environment = bound(ToolEnvironment([add, slow_word]))
    state: dict[str, Any] = {"prompt": [{"role": "user", "content": "?"}], "columns": {}}
    asyncio.run(environment.setup_state(state))
    calls = [call("add", a=2, b=3), call("slow_word", word="so"), call("slow_word", word=""), call("nothing")]
    text = "\n".join([*calls, call("add", a=1)])
    message = environment.parse("Let me see.\n" + text, state)
    responses = asyncio.run(environment.env_response([*state["prompt"], message], state))
    assert [(one["role"], one["name"]) for one in responses] == [
        ("tool", name) for name in ("add", "slow_word", "slow_word", "nothing", "add")
    ]
    assert [one["content"] for one in responses][:4] == [
        "5", "so", "{'error': 'no word'}", "{'error': 'Tool nothing not found'}",
    ]  # fmt: skip
    assert "missing 1 required positional argument: 'b'" in responses[4]["content"]
    assert (state["tool_calls"], state["tool_failures"]) == (5, 3)
    assert asyncio.run(environment.env_response([environment.parse("It is 5.", state)], state)) == []
    assert environment.tools[0].parameters["required"] == ["a", "b"]
    state["functions"]["add"] = lambda a: sys.exit(a)
    (exited,) = asyncio.run(environment.env_response([environment.parse(call("add", a=3), state)], state))
    assert exited["content"] == "{'error': '3'}"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"environment": None, "tools": ["math:sqrt"]}, "a tool must have type hints and a docstring"),
        ({"environment": None, "environment_factory": "random:Random"}, "must make objects with reset"),
        (
            {"environment": "nowhere"},
            r"objective.environment must be one of guess_number, package.module:Class, got 'nowhere'",
        ),
        ({"environment": "math:sqrt"}, "objective.environment must be a class derived from Environment"),
        ({"environment": {"name": f"{HERE}:Echo", "x": 1}}, "objective.environment must have the fields of"),
        ({"tools": [f"{HERE}:add"]}, "objective.environment must be null with"),
        ({"environment": None, "max_turns": 3}, "objective.max_turns must be null without"),
        ({"rollout": ROLLOUT | {"structured_outputs": {"regex": "a"}}}, "structured_outputs must be null with several"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ToolkitError, match=said):
        Trainer(recipe(tmp_path, fields), quiet=True)


@pytest.mark.parametrize("template", [HERMES, LLAMA, None])
@pytest.mark.parametrize("ended", [True, False])
def test_tokens_after_a_turn_are_those_of_the_whole_conversation(template: str | None, ended: bool) -> None:
    """Prompt, turn and what follows have the tokens of the conversation when it is rendered as a whole."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = template or tokenizer.chat_template
    tools = ToolEnvironment([add]) if template else SimpleNamespace(tools=())
    after = AfterTurn(SimpleNamespace(tokenizer=tokenizer, environment=tools, chat_template_kwargs=None))  # type: ignore[arg-type]
    user = [{"role": "user", "content": "1 + 2?"}]
    turn = {"role": "assistant", "content": "I look."}
    response = [{"role": "tool", "name": "add", "content": "3"}, {"role": "user", "content": "And?"}]
    shown = [tool.for_template() for tool in tools.tools] or None
    prompt = encode(tokenizer, render(tokenizer, user, shown, add_generation_prompt=True))
    sampled = [*encode(tokenizer, "I look."), *([end] if ended and template else [])]
    got = after.token_ids(response, [turn], sampled[-1], frozenset({end}))
    whole = encode(tokenizer, render(tokenizer, [*user, turn, *response], shown, add_generation_prompt=True))
    assert tokenizer.decode([*prompt, *sampled, *got]) == tokenizer.decode(whole)
    if template:
        assert [*prompt, *sampled, *got] == whole


def test_environments_of_trl_are_reset_for_each_conversation_and_judge_it(tmp_path: Path) -> None:
    """Tool calls are put in the place of what random weights write."""
    lines = [{"prompt": [{"role": "user", "content": "Count."}], "start": 10 * at} for at in range(12)]
    write_atomic(tmp_path / "lines.jsonl", "".join(strict_json(line) + "\n" for line in lines))
    fields = {
        "task": None, "data_files": str(tmp_path / "lines.jsonl"), "environment": None, "chat_template": HERMES,
        "environment_factory": f"{HERE}:Counter", "tools": [f"{HERE}:add"], "max_turns": 3, "prompts": 2,
        "rollout": ROLLOUT | {"max_completion_length": 200},
    }  # fmt: skip
    trainer = Trainer(recipe(tmp_path, fields, train={"max_length": 1200, "batch_tokens": 2048}), quiet=True)
    policy: Any = trainer.objective
    environment = policy.prompts.environment
    parse = environment.parse

    def called(text: str, state: dict[str, Any]) -> Any:
        return parse(call("increment", step=1 + state["seed"] % 2) if state["turn"] == 1 else "Done.", state)

    environment.parse = called
    seen = rolled(policy)
    trainer.train_step()
    tokenizer = policy.context.tokenizer
    assert len({id(one.state["environment"]) for one in seen}) == 8
    several = [one for one in seen if one.turns == 2]
    assert len(several) > 2
    for one in several:
        start, step = one.state["start"], 1 + one.state["seed"] % 2
        assert f"Count. It is {start}." in tokenizer.decode(one.prompt_token_ids)
        assert '"name": "increment"' in tokenizer.decode(one.prompt_token_ids)
        assert [message["role"] for message in one.messages] == ["assistant", "tool", "assistant"]
        assert one.messages[1]["content"] == f"now {start + step}"
        assert one.state["environment"].value == start + step
    metrics = policy.finish()[1]
    assert metrics["mismatch_bits"] == 0
    values = [one.state["environment"].value for one in seen]
    assert metrics["rewards/Counter/mean"] == pytest.approx(sum(values) / 8)
    assert metrics["tools/call_frequency"] == sum(one.state["tool_calls"] for one in seen) / 8
    assert isinstance(seen[0], Conversation)


def test_each_function_has_its_own_weight_and_name(tmp_path: Path) -> None:
    """Where each is normalised alone, too; one of the recipe's and two of the environment's, one by the same name."""
    fields = {
        "reward_funcs": [f"{HERE}:turns"], "reward_weights": [2.0], "multi_objective_aggregation": "normalize_then_sum",
    }  # fmt: skip
    trainer = Trainer(recipe(tmp_path, fields), quiet=True)
    policy: Any = trainer.objective
    assert policy.prompts.functions.names == ["turns", "ascii_share", "turns_2"]
    by_function = {"turns": [0.0, 1.0], "ascii_share": [1.0, 0.0], "turns_2": [0.0, 0.0]}
    judged = Judged([[0.0, 0.0]], by_function, {})
    advantages = policy._sum_of_normalised(judged)
    each = 0.5 / (0.5**0.5 + 1e-4)  # of two numbers 0 and 1
    total = 2.0 * each - 1.0 * each
    expected = total / (2**0.5 * total + 1e-4)
    torch.testing.assert_close(advantages, torch.tensor([[-expected, expected]], dtype=torch.float64))


def test_the_environment_of_the_docs_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# games.py\n.*?)```", text, re.DOTALL)
    (tmp_path / "docs_games.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    fields = {"environment": {"name": "docs_games:Twenty", "hard": True}, "max_turns": 4}
    trainer = Trainer(recipe(tmp_path, fields), quiet=True)
    policy: Any = trainer.objective
    seen = rolled(policy)
    list(policy.updates(0))
    assert {one.turns for one in seen} >= {4}
    assert policy.finish()[1]["rewards/found/mean"] == 0.0


def test_environments_by_name() -> None:
    found = make_environment({"name": "guess_number", "max_turns": 5}, None, [])
    assert found is not None
    assert found.max_turns == 5
    state: dict[str, Any] = {"answer": "3\n<\n 2", "responses": [" 4\n"]}
    found.setup_state(state)
    assert not found.is_completed("", state)
    assert found.env_response("", state) == "<\n"
    for guess, response in (("1", ">\n"), ("x", "?\n"), ("٣", "?\n"), ("9" * 5000, "<\n")):
        state["responses"].append(guess)
        assert found.env_response("", state) == response
    state["responses"].append(" 2\n")
    assert found.is_completed("", state)
    assert make_environment(None, None, []) is None


@pytest.mark.sweep
def test_a_run_learns_to_guess(tmp_path: Path) -> None:
    """After a warm-up on random games; every step has bitwise identical log-probabilities."""
    from toolkit.config.load import load_recipe

    result = train(load_recipe("recipes/environment.yaml", [f"output_dir={tmp_path}"]), quiet=True)
    lines = read_metrics(tmp_path / "environment" / "metrics.jsonl")
    assert [line["mismatch_bits"] for line in lines] == [0] * 60
    first, last = (sum(line["reward"] for line in part) / 8 for part in (lines[:8], lines[-8:]))
    assert last > first + 0.05, (first, last)
    assert result["eval_samples"] == 256
