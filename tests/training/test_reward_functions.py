"""Reward functions with TRL's signature: what they are called with, what they may return, what drops a completion."""

import asyncio
import math
import re
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from tests.helpers.objective_recipes import objective_recipe
from toolkit.errors import ToolkitError
from toolkit.files import write_atomic
from toolkit.strict_json import strict_json
from toolkit.testing.models import tiny_tokenizer
from toolkit.training.loop import Trainer, train
from toolkit.training.losses import sum_of_normalised
from toolkit.training.metrics import read_metrics
from toolkit.training.objectives.on_policy import OnPolicyObjective
from toolkit.training.reward_functions import RewardFunctions, load_reward_functions

HERE = "tests.training.test_reward_functions"
PROMPTS, COMPLETIONS, IDS = ["a", "a", "b"], ["x", "yy", ""], [[1], [2, 2], []]
COLUMNS = [{"target": 1}, {"target": 1}, {"target": 2, "hint": "h"}]


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(one)) for one in completions]


async def by_name(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], target: list[int],
    hint: list[str | None], trainer_state: Any, log_metric: Any, log_extra: Any,
) -> list[float | None]:  # fmt: skip
    assert (prompts, completions, completion_ids) == (PROMPTS, COMPLETIONS, IDS)
    assert (target, hint) == ([1, 1, 2], [None, None, "h"])
    log_metric("judge/step", trainer_state.global_step)
    log_extra("verdict", ["good"] * 3)
    return [None, 10.0, None]


def nothing(completions: list[str], **_: Any) -> list[None]:
    return [None] * len(completions)


def nan_of_the_second(completions: list[str], **_: Any) -> list[float]:
    return [math.nan if one == "yy" else 1.0 for one in completions]


def no_empty_text(completions: list[str], hint: list[str | None], **_: Any) -> np.ndarray:
    if "" in completions:
        raise ValueError("an empty text")
    return np.array([0.5] * len(completions))


async def no_empty_text_later(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0)
    if "" in completions:
        raise TimeoutError("of a server, not the recipe's")
    return [0.5] * len(completions)


def too_few(**_: Any) -> list[float]:
    return [1.0]


def endless(completions: list[str], **_: Any) -> list[float]:
    return [math.inf] * len(completions)


def broken(**_: Any) -> list[float]:
    raise KeyError("target")


BARRIER = threading.Barrier(3)


async def meets(completions: list[str], **_: Any) -> list[float]:
    await asyncio.to_thread(BARRIER.wait, 60)
    return [1.0] * len(completions)


async def meets_too(completions: list[str], **given: Any) -> list[float]:
    return await meets(completions, **given)


def meets_plainly(completions: list[str], **_: Any) -> list[float]:
    BARRIER.wait(60)
    return [1.0] * len(completions)


def exits(completions: list[str], **_: Any) -> list[float]:
    if "" in completions:
        sys.exit(3)
    return [1.0] * len(completions)


async def exits_later(completions: list[str], **_: Any) -> list[float]:
    await asyncio.gather(asyncio.sleep(0), asyncio.to_thread(len, completions))
    return exits(completions)


ENDED = threading.Event()


async def never(**_: Any) -> list[float]:
    await asyncio.Event().wait()
    return []


def busy(**_: Any) -> list[float]:
    try:
        while True:
            time.monotonic()
    finally:
        ENDED.set()


def loaded(*names: str, **given: Any) -> RewardFunctions:
    return RewardFunctions(list(names), [globals()[name] for name in names], **given)


def rewards(*names: str, **given: Any) -> Any:
    return loaded(*names, **given)(PROMPTS, COMPLETIONS, IDS, COLUMNS)


def test_weights_and_functions_that_do_not_apply() -> None:
    functions = loaded("length", "by_name", weights=[2.0, 0.5])
    functions.trainer_state.global_step = 7
    found = functions(PROMPTS, COMPLETIONS, IDS, COLUMNS)
    assert found.totals == [2.0, 9.0, 0.0]
    assert [math.isnan(value) for value in found.by_function[1]] == [True, False, True]
    assert [one.count for one in found.failures] == [0, 0]
    assert functions.take_logged() == {"judge/step": [7.0]}
    assert functions.take_logged() == {}
    assert all(map(math.isnan, rewards("nothing").totals))
    assert RewardFunctions.load([f"{HERE}:length", "math:sqrt"]).names == ["length", "sqrt"]
    assert RewardFunctions.load(["math:sqrt", "cmath:sqrt"]).names == ["math:sqrt", "cmath:sqrt"]
    assert loaded("length")([], [], [], []).totals == []
    assert loaded("length", "length", "by_name", "length").names == ["length", "length_2", "by_name", "length_3"]


@pytest.mark.parametrize(
    ("name", "dropped", "first"),
    [
        ("nan_of_the_second", [1], "the reward function nan_of_the_second returned NaN"),
        ("no_empty_text", [2], r"the reward function no_empty_text raised ValueError at .*: an empty text"),
        ("exits", [2], r"the reward function exits raised SystemExit at .*: 3"),
        ("exits_later", [2], r"the reward function exits_later raised SystemExit at .*: 3"),
        ("no_empty_text_later", [2], "the reward function no_empty_text_later raised TimeoutError .*not the recipe's"),
    ],
)
def test_a_completion_that_a_function_fails_for_is_dropped_alone(name: str, dropped: list[int], first: str) -> None:
    """Even where another function judges it; all others keep the sum of both."""
    found = rewards("length", name)
    assert [at for at, total in enumerate(found.totals) if math.isnan(total)] == dropped
    alone = rewards(name).totals
    for at, text in enumerate(COMPLETIONS):
        if at not in dropped:
            assert found.totals[at] == len(text) + alone[at]
    assert [one.count for one in found.failures] == [0, 1]
    assert re.match(first, found.failures[1].first)


def test_functions_run_at_the_same_time() -> None:
    """Each waits for the others: one after the other none would return."""
    assert rewards("meets", "meets_too", "meets_plainly").totals == [3.0] * 3


def test_a_function_that_takes_too_long_drops_its_completions() -> None:
    functions = loaded("never", "busy", timeout=0.05)
    functions._worked = [True] * 2
    found = functions(PROMPTS, COMPLETIONS, IDS, COLUMNS)
    assert all(map(math.isnan, found.totals))
    assert [one.count for one in found.failures] == [3, 3]
    assert found.failures[0].first == (
        "the reward function never must return within objective.reward_timeout, which is 0.05 seconds"
    )
    assert ENDED.wait(60)  # a loop in Python is ended, not left to run
    assert [one.count for one in loaded("length", timeout=60.0)(PROMPTS, COMPLETIONS, IDS, COLUMNS).failures] == [0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("too_few", "must return a list with a number for each of 3 completions, got 1 of them."),
        ("endless", "must be a finite number, or None where it does not apply, got inf"),
        ("broken", "raised KeyError at .*test_reward_functions.py:[0-9]+ for a step's completions: 'target'; it has"),
    ],
)
def test_errors_name_the_function(name: str, said: str) -> None:
    with pytest.raises(ToolkitError, match=f"^the reward function {name} {said if '.*' in said else re.escape(said)}"):
        rewards(name)


def reward_model(folder: Path, labels: int = 1) -> Any:
    """A folder with a random reward model, and transformers' own model of it."""
    config = LlamaConfig(
        vocab_size=331, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, num_labels=labels, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(3)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("messages", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_a_reward_model_judges_beside_functions(tmp_path: Path, messages: bool) -> None:
    """Its scores are those of transformers' forward of each sequence alone."""
    model, tokenizer = reward_model(tmp_path / "judge")
    names = [str(tmp_path / "judge"), f"{HERE}:length_of_all"]
    recipe = line_recipe(tmp_path, {"reward_funcs": names, "reward_weights": [2.0, 0.0]}, train={"batch_tokens": 64})
    if messages:
        template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "judge")
        lines = [{"prompt": [{"role": "user", "content": f"{at} :"}]} for at in range(12)]
        write_atomic(tmp_path / "prompts.jsonl", "".join(strict_json(line) + "\n" for line in lines))
        fields = recipe.objective.model_dump() | {"chat_template": template}
        recipe = line_recipe(tmp_path / "of", fields | {"data_files": str(tmp_path / "prompts.jsonl")})
    policy: Any = Trainer(recipe, quiet=True).objective
    problems, groups = policy.roll_out(0, 3)
    judged = policy.prompts.judge(problems, groups)
    exact = []
    for problem, group in zip(problems, groups):
        for one in group:
            prompt = policy.prompts.prompt(problem)
            text = prompt + one.text if not messages else f"[user] {prompt[0]['content']}\n[assistant] {one.text}\n"
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            exact.append(model(input_ids=torch.tensor([ids])).logits.item())
    assert len(exact) == 6
    assert judged.by_function["judge"] == pytest.approx(exact, abs=1e-5)
    assert [reward for group in judged.rewards for reward in group] == pytest.approx(
        [2 * one for one in exact], abs=2e-5
    )


def test_what_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match=r"^objective\.reward_funcs\[0\].*nowhere"):
        load_reward_functions([str(tmp_path / "nowhere")])
    LlamaForCausalLM(
        LlamaConfig(vocab_size=331, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "causal")
    with pytest.raises(
        ToolkitError, match=r"reward_funcs\[0\] must be a function by module:function, or a model with one"
    ):
        load_reward_functions([str(tmp_path / "causal")])


@pytest.mark.parametrize("name", ["tests.nowhere:f", f"{HERE}:nowhere", f"{HERE}:PROMPTS"])
def test_what_is_no_function(name: str) -> None:
    with pytest.raises(ToolkitError, match=r"^objective\.reward_funcs\[0\] must be a function"):
        load_reward_functions([name])


def test_sums_of_normalised_rewards() -> None:
    """GDPO's, by numpy: what does not apply is in no mean; a function with one completion of a group says nothing."""
    nan = math.nan
    given = [[[0.0, 1.0, 3.0, nan], [nan, nan, nan, 2.0]], [[5.0, 5.0, nan, nan], [nan, nan, 1.0, 2.0]]]
    got = sum_of_normalised(torch.tensor(given, dtype=torch.float64), [2.0, -0.5])
    exact = np.zeros((2, 4))
    for values, weight in zip(np.array(given), [2.0, -0.5]):
        for row in range(2):
            known = ~np.isnan(values[row])
            if known.sum() > 1:
                one = values[row, known]
                exact[row, known] += weight * (one - one.mean()) / (one.std(ddof=1) + 1e-4)
    exact[0, 3] = exact[1, :2] = np.nan
    np.testing.assert_allclose(got.numpy(), exact, rtol=1e-12)


def ascii_share(completions: list[str], **_: Any) -> list[float | None]:
    return [sum(map(str.isascii, one)) / max(len(one), 1) for one in completions]


def fails_for_some(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    if any("!" in one for one in completions):
        raise RuntimeError("cannot be judged")
    return [float(len(one)) for one in completions]


def line_recipe(folder: Path, objective: dict[str, Any], **sections: Any) -> Any:
    lines = [{"prompt": f"{at} :"} for at in range(12)]
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "prompts.jsonl", "".join(strict_json(line) + "\n" for line in lines))
    fields = {
        "task": None, "data_files": str(folder / "prompts.jsonl"), "prompts": 2, "num_generations": 4,
        "reward_funcs": [f"{HERE}:ascii_share", f"{HERE}:fails_for_some"],
    }  # fmt: skip
    return objective_recipe(folder, "grpo", fields | objective, **sections)


@pytest.mark.parametrize(
    "aggregation", ["sum_then_normalize", pytest.param("normalize_then_sum", marks=pytest.mark.sweep)]
)
def test_dropped_completions_have_no_part_in_a_step(tmp_path: Path, aggregation: str) -> None:
    """Texts of eight completions of two prompts are given; advantages are those of the others, by numpy."""
    texts = [["a!", "bb", "é", "dddd"], ["!", "a!", "!!", "bb"]]
    weights = [1.0, 0.25]
    recipe = line_recipe(tmp_path, {"multi_objective_aggregation": aggregation, "reward_weights": weights, "beta": 0.1})
    trainer = Trainer(recipe, quiet=True)
    policy: Any = trainer.objective
    said: list[str] = []
    object.__setattr__(policy.context, "log", said.append)
    generate = policy.rollout.generate

    def given(*args: Any) -> Any:
        groups = generate(*args)
        for group, own in zip(groups, texts, strict=True):
            for one, text in zip(group, own, strict=True):
                one.text = text
        return groups

    policy.rollout.generate = given
    samples = [sample for micro in next(policy.updates(0)) for sample in micro.samples if sample.weight]
    kept = ["bb", "é", "dddd"]  # the second prompt has one left: its group is dropped
    each = np.array([[1.0, 0.0, 1.0], [2.0, 1.0, 4.0]])
    centred = each - each.mean(1, keepdims=True)
    if aggregation == "sum_then_normalize":
        total = weights @ each
        exact = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    else:
        both = weights @ (centred / (each.std(1, ddof=1, keepdims=True) + 1e-4))
        alone = np.array([0.0])  # the one that is left, in the normalisation over the step
        every = np.concatenate([both, alone])
        exact = (both - every.mean()) / (every.std(ddof=1) + 1e-4)
    assert [sample.advantage for sample in samples] == pytest.approx(exact.tolist(), rel=1e-9)
    assert sum(sample.weight * len(sample.tokens) for sample in samples) == pytest.approx(1.0)
    assert len(samples) == len(kept)
    metrics = policy.finish()[1]
    assert (metrics["rewards/fails_for_some/failed"], metrics["rewards/ascii_share/failed"]) == (4, 0)
    assert (metrics["unscored_fraction"], metrics["groups_dropped"], metrics["groups"]) == (0.5, 1, 1)
    assert sum("cannot be judged; rewards/fails_for_some/failed counts" in line for line in said) == 1


def test_failures_in_other_processes_are_printed() -> None:
    policy: Any = SimpleNamespace(
        prompts=SimpleNamespace(functions=object(), environment=None, take_logged=lambda: {"mine": [1.0]}),
        _failed={}, _said=set(),
    )  # fmt: skip
    policy._say_once = partial(OnPolicyObjective._say_once, policy)
    elsewhere = ({"mine": [3.0]}, {"rewards/f/failed": "the reward function f raised KeyError: 'a'"})
    said: list[str] = []
    policy.context = SimpleNamespace(log=said.append, gather_objects=lambda own: [own, elsewhere])
    for _ in range(2):
        assert OnPolicyObjective._logged(policy) == {"mine": 2.0}
    assert said == ["note: the reward function f raised KeyError: 'a'; rewards/f/failed counts such completions"]


def test_stop_strings_end_completions_and_are_trained_on(tmp_path: Path) -> None:
    """Bitwise: the engine's log-probabilities of the tokens of a stop string, too, are those of training."""
    stop = [chr(at) for at in range(33, 64)]
    recipe = line_recipe(
        tmp_path,
        {"rollout": {"max_completion_length": 8, "max_num_seqs": 16, "stop": stop}, "prompts": 6,
         "reward_funcs": [f"{HERE}:length_of_all"]},
    )  # fmt: skip
    trainer = Trainer(recipe, quiet=True)
    policy: Any = trainer.objective
    seen: list[Any] = []
    generate = policy.rollout.generate
    policy.rollout.generate = lambda *args: seen.append(generate(*args)) or seen[-1]
    trainer.train_step()
    ended = [one for groups in seen for group in groups for one in group if one.stop_reason in stop]
    assert len(ended) > 3
    for one in ended:
        assert not any(text in one.text for text in stop)
        assert one.stop_reason in policy.context.tokenizer.decode(one.token_ids)
    assert policy.finish()[1]["mismatch_bits"] == 0


def length_of_all(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(one)) for one in completion_ids]


@pytest.mark.sweep
def test_it_learns_from_what_is_not_dropped(tmp_path: Path) -> None:
    recipe = line_recipe(
        tmp_path, {"reward_weights": [1.0, 0.0], "prompts": 8, "num_generations": 8},
        train={"max_steps": 12, "batch_tokens": 1024}, optimizer={"learning_rate": 2e-2, "weight_decay": 0.0},
        schedule={"lr_scheduler_type": "constant_with_warmup"}, checkpoint={"save_steps": None},
    )  # fmt: skip
    train(recipe, quiet=True)
    lines = read_metrics(tmp_path / "runs" / "grpo" / "metrics.jsonl")
    assert [line["mismatch_bits"] for line in lines] == [0] * 12
    assert sum(line["rewards/fails_for_some/failed"] for line in lines) > 0
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.2
