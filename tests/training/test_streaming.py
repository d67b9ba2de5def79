"""Datasets that are streamed: every line once a pass, what is held out, and a position that resumes anywhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.objective_recipes import objective_recipe
from toolkit.errors import ToolkitError
from toolkit.training.formats import SFT_FORMATS, check
from toolkit.training.given import GivenLines, open_lines
from toolkit.training.loop import Trainer
from toolkit.training.objectives.sft import SFTSection

LINES = [{"text": f"line {at} " + "x" * (at % 5)} for at in range(57)]


@pytest.fixture(params=["jsonl", "parquet"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / f"lines.{request.param}"
    if request.param == "parquet":
        from datasets import Dataset

        Dataset.from_list(LINES).to_parquet(str(file))
    else:
        file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return file


def opened(path: Path, share: float = 0.2, **fields: Any) -> GivenLines:
    section = SFTSection.model_validate(
        {
            "kind": "sft",
            "datasets": [{"path": str(path), "streaming": True, "shuffle_buffer_size": 8, **fields}],
            "evaluation": {"val_set_size": share},
        }
    )
    found = open_lines(section, lambda line: check(line, SFT_FORMATS))
    assert found is not None
    return found


def texts(lines: list[Any]) -> list[str]:
    return [line.value["text"] for line in lines]


def test_every_line_once_a_pass_and_none_that_is_held_out(path: Path) -> None:
    given = opened(path)
    held, all_of_them = set(texts(list(given.held_out))), {line["text"] for line in LINES}
    assert 2 <= len(held) <= 25
    stream = given.stream(seed=1)
    passes = [texts(stream.take(len(LINES) - len(held))) for _ in range(2)]
    assert [set(one) for one in passes] == [all_of_them - held] * 2
    assert passes[0] != passes[1]
    assert texts(given.stream(seed=2).take(10)) != passes[0][:10]
    shares = [texts(given.stream(1, rank, 2).take(12)) for rank in range(2)]
    assert not set(shares[0]) & set(shares[1])
    assert len(texts(opened(path, max_samples=5).stream(0).take(5))) == 5


def test_a_position_resumes_anywhere(path: Path) -> None:
    given = opened(path)
    stream = given.stream(seed=3)
    whole = texts(stream.take(130))
    for at in (0, 1, 7, 8, 9, 44, 60, 101):
        before = given.stream(seed=3)
        before.take(at)
        state = json.loads(json.dumps(before.state_dict()))
        after = opened(path).stream(seed=3)
        after.load_state_dict(state)
        assert texts(after.take(130 - at)) == whole[at:], at


def test_what_cannot_be_streamed(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"other": 1}\n')
    with pytest.raises(ToolkitError, match="must be a JSON object with 'messages'"):
        opened(path)
    both = [{"path": "a", "streaming": True}, {"path": "b"}]
    with pytest.raises(ToolkitError, match=r"objective\.datasets\[0\]\.streaming must be false for one of several"):
        objective_recipe(tmp_path, "sft", {"task": None, "datasets": both})
    with pytest.raises(ToolkitError, match=r"train\.num_train_epochs must be null with a dataset that is streamed"):
        objective_recipe(tmp_path, "sft", {"task": None, "datasets": both[:1]}, train={"num_train_epochs": 1})
    with pytest.raises(ToolkitError, match=r"streaming must be false with objective\.kind 'grpo'"):
        objective_recipe(tmp_path, "grpo", {"task": None, "datasets": both[:1], "reward_funcs": ["a:b"]})


@pytest.mark.sweep
def test_long_texts_are_split_so_that_each_token_is_predicted_once(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "abcdefghij" * 7}) + "\n")
    recipe = objective_recipe(
        tmp_path,
        "sft",
        {
            "task": None, "datasets": [{"path": str(path), "streaming": True}],
            "evaluation": {"val_set_size": 1e-9}, "excess_length_strategy": "split",
        },
        train={"max_length": 16},
    )  # fmt: skip
    trainer = Trainer(recipe, quiet=True)
    objective: Any = trainer.objective
    (line,) = objective.stream._stream.take(1)
    parts = objective.examples(line)
    ids = trainer.tokenizer("abcdefghij" * 7)["input_ids"] + [trainer.tokenizer.eos_token_id]
    assert [len(part.inputs) for part in parts] == [16, 16, 16, 16, len(ids) - 1 - 64]
    assert [token for part in parts for token in part.targets] == ids[1:]
    assert [token for part in parts for token in part.inputs] == ids[:-1]
    assert "split: 1 examples longer than train.max_length 16" in objective.data_report
