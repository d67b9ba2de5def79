"""Rollouts by actors of Ray are those of one engine: ``infer_patches/ray.py`` and ``docs/ray.md``.

Ray is installed beside this environment's packages.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.client_environments import ROOT, SCRIPTS, client_environment, run_client

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

VARIABLES = {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "TRL_EXPERIMENTAL_SILENCE": "1"}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return client_environment(tmp_path_factory.mktemp("environment"), "ray", ["ray>=2.60"], beside=True)


def output_of(python: str, folder: Path, *arguments: str) -> str:
    with tempfile.TemporaryDirectory(prefix="ray-") as sockets:  # whose paths must be short
        return run_client([python, *arguments], folder, **VARIABLES, TMPDIR=sockets)


def run(python: str, case: str, folder: Path) -> Any:
    out = output_of(python, folder, str(SCRIPTS / "ray_rollouts.py"), case)
    return json.loads(out.strip().splitlines()[-1])


@pytest.mark.parametrize("case", ["object store", "folder", "experts"])
def test_samples_are_those_of_one_engine_before_and_after_a_step_and_with_a_killed_actor(case, python, tmp_path):
    found = run(python, case, tmp_path)
    assert found["ray"] == found["engine"]
    before, middle, after = found["engine"]
    assert before != after
    versions = [{version for one in part for version in one[5]} for part in (before, middle, after)]
    assert versions == [{found["version"] - 2}, {found["version"] - 1}, {found["version"]}]
    assert found["stats"] == {"weight_version": found["version"], "num_workers": 2, "num_restarts": 1}
    assert found["left"] == []


def test_failures_are_sentences(python, tmp_path):
    found = run(python, "failures", tmp_path)
    assert found["prompt"] == found["prompt, engine"] != ""
    assert found["ended"].startswith("A rollout worker has ended after 0 restarts of max_restarts 0: ")
    assert found["closed"] == "the engine is closed; make another one."
    assert "max_sequences" in found["argument"]
    assert "after which 1 of 1 had not started; each needs 512 CPUs and 0 GPUs" in found["resources"]


def test_trl_trains_to_the_same_weights_as_with_the_engine_in_its_process(python, tmp_path):
    found = run(python, "trl", tmp_path)
    assert found["same weights"]
    assert found["versions"] >= 2
    assert found["bits"]
    assert set(found["bits"]) == {0.0}
    assert len(found["rewards"][0]) == len(found["rewards"][1]) == 3
    assert found["rewards"][0][0] == found["rewards"][1][0]  # the loss is TRL's own there, with its own last bits


def test_a_recipe_trains_to_the_same_weights_as_with_the_engine_in_its_process(python, tmp_path):
    assert run(python, "recipe", tmp_path)["same weights"]


def test_one_function_serves_trl_and_recipes(python, tmp_path):
    found = run(python, "functions", tmp_path)
    assert max(found["mismatch"]) < 1e-10  # of sampling, which TRL asks for: they may differ in the last bit
    assert found["resumed"]
    assert found["steps"] == 2


def test_the_page_s_program_runs(python, tmp_path):
    (program,) = re.findall(r"```python\n(import .*?)```", (ROOT / "docs" / "ray.md").read_text(), re.DOTALL)
    (tmp_path / "rollout.py").write_text(program)
    rewards = [float(one) for one in output_of(python, tmp_path, "rollout.py").split()[-2:]]
    assert rewards[1] > rewards[0] + 0.1
