"""TRL's ``rollout_func`` in a recipe: what it is given, what becomes of what it returns."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.objective_recipes import LOWER, check_resumes, dense_logprobs, objective_recipe
from toolkit.errors import ToolkitError
from toolkit.training.loop import Trainer
from toolkit.training.metrics import read_metrics
from toolkit.training.rollout_functions import GivenCompletion

HERE = "tests.training.test_rollout_func"
SEEN: list[Any] = []


def generated(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """By transformers' own generation, as a user of TRL writes it."""
    SEEN.append((prompts, trainer.state.global_step))
    prompt_ids = trainer._tokenize_prompts(list(prompts))[0]
    torch.manual_seed(trainer.args.seed + trainer.state.global_step)
    completions, logprobs = [], []
    with torch.no_grad():
        for ids in prompt_ids:
            given = torch.tensor([ids])
            out = trainer.model.generate(
                given, attention_mask=torch.ones_like(given), generation_config=trainer.generation_config
            )
            completions.append(out[0, len(ids) :].tolist())
            logprobs.append(dense_logprobs(trainer.model, out[0].tolist())[len(ids) - 1 :].tolist())
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": logprobs}


def masked(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Every second token is an environment's; a column for the reward function."""
    found = generated(prompts, trainer)
    masks = [[at % 2 == 0 for at in range(len(ids))] for ids in found["completion_ids"]]
    return {**found, "env_mask": masks, "lucky": [at % 3 for at in range(len(prompts))], "of_all": "x"}


def unscored(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    return {**generated(prompts, trainer), "logprobs": None}


def lucky(completions: list[Any], lucky: list[int], of_all: list[str], **_: Any) -> list[float]:
    assert of_all == ["x"] * len(completions)
    return [float(one) for one in lucky]


def trainer_of(folder: Path, name: str, **fields: Any) -> Trainer:
    given = {"task": LOWER, "prompts": 2, "num_generations": 3, "rollout_func": f"{HERE}:{name}", **fields}
    return Trainer(objective_recipe(folder, "grpo", given, model={"dtype": "float64"}), quiet=True)


def test_it_is_called_as_trl_does(tmp_path: Path) -> None:
    seen = importlib.import_module(HERE).SEEN  # of the module that the recipe names
    seen.clear()
    objective: Any = trainer_of(tmp_path, "generated").objective
    objective.begin()
    problems, groups = objective.roll_out(0, 3)
    ((prompts, step),) = seen
    assert prompts == [problem.prompt for problem in problems for _ in range(3)]
    assert step == 0
    assert [len(group) for group in groups] == [3, 3]
    for problem, group in zip(problems, groups):
        for one in group:
            assert isinstance(one, GivenCompletion)
            assert one.prompt_token_ids == objective.prompts.token_ids(problem)
            assert one.text == objective.context.tokenizer.decode(one.token_ids, skip_special_tokens=True)


def test_runs_resume(tmp_path: Path) -> None:
    fields = {"task": LOWER, "prompts": 2, "num_generations": 3, "rollout_func": f"{HERE}:generated"}
    recipe = objective_recipe(tmp_path, "grpo", fields)
    whole = Trainer(recipe, quiet=True)
    whole.fit()
    check_resumes(whole, recipe)
    lines = read_metrics(tmp_path / "runs" / "grpo" / "metrics.jsonl")
    assert all(line["rollout_tokens"] > 0 and line["mismatch_kl"] < 1e-6 for line in lines)


def test_tokens_of_an_environment_are_not_trained_on(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"prompt": f"{at} and"}) + "\n" for at in range(30)))
    trainer = trainer_of(
        tmp_path, "masked", task=None, data_files=str(lines), reward_funcs=[f"{HERE}:lucky"], scale_rewards="none",
        loss_type="dapo",
    )  # fmt: skip
    objective: Any = trainer.objective
    micros = next(objective.updates(0))
    loss = sum(objective.loss(trainer.forward, micro) for micro in micros)
    total, count = 0.0, 0
    for sample in (sample for micro in micros for sample in micro.samples if sample.weight):
        own = dense_logprobs(trainer.hf_model, sample.sequence)[-len(sample.tokens) :][::2]
        assert sample.behaviour == pytest.approx(own.tolist(), rel=1e-6)
        total -= sample.advantage * len(own)  # the ratio is 1
        count += len(own)
    assert float(loss) == pytest.approx(total / count, abs=1e-6)


def test_log_probabilities_may_be_left_to_the_run(tmp_path: Path) -> None:
    objective: Any = trainer_of(tmp_path, "unscored").objective
    for group in objective.rollout_function(objective.stream.take(2), 0):
        for one in group:
            exact = dense_logprobs(objective.context.model.model, [*one.prompt_token_ids, *one.token_ids])
            assert one.logprobs == pytest.approx(exact[-len(one.token_ids) :].tolist(), rel=1e-6)


def raises(prompts: list[Any], trainer: Any) -> Any:
    raise KeyError("no server")


def too_few(prompts: list[Any], trainer: Any) -> Any:
    return {"prompt_ids": [[1]], "completion_ids": [[2]], "logprobs": [[0.0]]}


def keyless(prompts: list[Any], trainer: Any) -> Any:
    return {"prompt_ids": [[1]] * len(prompts)}


def uneven(prompts: list[Any], trainer: Any) -> Any:
    count = len(prompts)
    return {"prompt_ids": [[1]] * count, "completion_ids": [[2, 3]] * count, "logprobs": [[0.0]] * count}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "no server"),
        ("too_few", "must return 6 of prompt_ids, one for each prompt, got 1"),
        ("keyless", r"must return a mapping with prompt_ids, completion_ids, logprobs, got none of \['completion_ids'"),
        ("uneven", "must return logprobs and env_mask with a value for each of 2 tokens"),
    ],
)
def test_what_goes_wrong_is_one_sentence(name: str, said: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, name)
    with pytest.raises(ToolkitError, match=said):
        trainer.train_step()


def test_a_function_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match=r"objective\.rollout_func must be a function to import"):
        trainer_of(tmp_path, "nothing_here")
