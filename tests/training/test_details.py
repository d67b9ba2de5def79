"""details.jsonl: completions, blocks and expert loads of the steps that the recipe asks for, and of no others."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.moe_recipes import moe_recipe
from toolkit.training.details import FILE as DETAILS
from toolkit.training.loop import train
from toolkit.training.metrics import FILE, read_metrics


def details_of(tmp_path: Path, kind: str, **log: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    recipe = moe_recipe(tmp_path, kind, {}, log=log, train={"max_steps": 3}, checkpoint={"save_steps": None})
    train(recipe, quiet=True)
    folder = tmp_path / "runs" / recipe.run_name
    return read_metrics(folder / DETAILS), read_metrics(folder / FILE)


def test_steps_of_rollouts_leave_what_the_page_shows(tmp_path: Path) -> None:
    details, metrics = details_of(tmp_path, "grpo", details_steps=2, num_completions=6)
    assert [line["step"] for line in details] == [1, 3]
    for line in details:
        (logged,) = [one for one in metrics if one["step"] == line["step"]]
        completions = line["completions"]
        assert len(completions) == 6
        assert len({one["prompt"] for one in completions}) == 2  # of groups of four
        assert all(one["logprob"] < 0 and 0 < one["tokens"] <= 8 for one in completions)
        assert 0 <= min(one["reward"] for one in completions) <= logged["reward"] + 1
        (group,) = line["groups"]
        assert sum(held for held, _ in group["cells"]) > 0  # in the middle of the rollout
        assert group["runs"] == []  # no sequence fills a block
        loads = line["expert_load"]
        assert [len(load) for load in loads] == [6, 6]
        assert len({sum(load) for load in loads}) == 1
        busiest = max(max(load) * len(load) / sum(load) for load in loads)
        assert busiest == pytest.approx(logged["expert_load_max"])


def test_a_run_without_rollouts_has_loads_alone_and_null_writes_none(tmp_path: Path) -> None:
    details, _ = details_of(tmp_path / "one", "pretrain", details_steps=1)
    assert [sorted(line) for line in details] == [["expert_load", "step"]] * 3
    assert details_of(tmp_path / "two", "pretrain", details_steps=None)[0] == []
    assert json.loads(json.dumps(details)) == details
