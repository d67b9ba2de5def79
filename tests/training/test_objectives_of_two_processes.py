"""Objectives whose loss or advantages are over all processes: the step of two is that of one."""

from pathlib import Path

import pytest

from tests.helpers.processes import run_processes
from tests.training.two_objectives import FIELDS, recipe_of
from toolkit.training.loop import train
from toolkit.training.metrics import read_metrics


@pytest.mark.sweep
@pytest.mark.parametrize("kind", FIELDS)
def test_two_processes_are_one(kind: str, tmp_path: Path) -> None:
    run_processes("training/two_objectives.py", tmp_path, kind, says="same weights")
    train(recipe_of(tmp_path, kind, "one"), quiet=True)
    one, two = (read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("one", "two"))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in one] == pytest.approx([line[key] for line in two], rel=1e-4, abs=1e-6)
    assert one[0]["num_tokens"] == two[0]["num_tokens"]
