"""Runs that report to wandb and trackio themselves, offline, and resume: all steps are there, once."""

import json
from pathlib import Path

import pytest

from tests.helpers.client_environments import ROOT, client_environment, run_client, run_script
from tests.helpers.training_recipes import tiny_recipe, write_corpus
from toolkit.config import dump

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
PACKAGES = ["wandb==0.31.0", "trackio==0.43.0"]
PINS = ["pillow==12.3.0", "huggingface_hub==2.4.0"]  # trackio does not take the newest Pillow yet


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return client_environment(tmp_path_factory.mktemp("environment"), "loggers", PACKAGES, PINS, beside=True)


def test_every_step_of_a_run_in_two_parts_is_in_both(python: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    for steps, resumed in ((4, []), (8, ["--resume"])):
        recipe = tiny_recipe(
            tmp_path, log={"report_to": ["wandb", "trackio"], "project": "colours"}, train={"max_steps": steps}
        )
        file = tmp_path / "recipe.yaml"
        file.write_text(dump(recipe), encoding="utf-8")
        run_client([python, "-m", "toolkit.cli", "train", str(file), *resumed], tmp_path, PYTHONPATH=str(ROOT))
    folder = tmp_path / "runs" / "tiny"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["loss"] for line in lines}
    assert sorted(losses) == list(range(1, 9))
    found = run_script(python, "logged_runs.py", tmp_path, str(folder), "colours", "tiny")
    assert {one["step"]: one["loss"] for one in found["wandb"]} == losses
    assert len({one["file"].partition(".")[0] for one in found["wandb"]}) == 1  # two files of one run
    assert [one["step"] for one in found["trackio"]] == list(losses)
    assert [one["loss"] for one in found["trackio"]] == list(losses.values())
