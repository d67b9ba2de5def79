"""verl 0.9.1's own code on this project's rollout and actor: ``train_patches/verl`` and ``docs/verl.md``.

verl wants an older transformers than this project, so it is installed without what it needs, beside this
environment's packages.
"""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.client_environments import KEPT, ROOT, SCRIPTS, client_environment, run_client
from toolkit.testing.models import random_model

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

NEEDED = ["ray>=2.60", "tensordict", "omegaconf", "hydra-core", "codetiming", "cachetools", "torchdata", "pylatexenc"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("verl")
    python = client_environment(root, "verl", NEEDED, beside=True)
    source = Path(os.environ.get(KEPT, root)) / "verl-source"
    if not source.exists():
        command = [python, "-m", "pip", "install", "-q", "--no-deps", "--target", str(source), "verl==0.9.1"]
        subprocess.run(command, check=True)
    model = root / "model"
    random_model("llama").save_pretrained(model)
    variables = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(source)]), "RAY_USAGE_STATS_ENABLED": "0", "TMPDIR": "/tmp",
        "VERL_USE_EXTERNAL_MODULES": "train_patches.verl.plugin", "TOOLKIT_VERL_CHECK": "1",
    }  # fmt: skip
    out = run_client([python, str(SCRIPTS / "verl_contract.py"), str(model)], root, **variables)
    return json.loads(out.strip().splitlines()[-1])


def test_samples_are_the_engine_s_before_and_after_an_update(found):
    assert found["equal"] == [True] * 4
    assert found["steps"] == [None, None, 3, 3]


def test_aborted_requests_keep_their_tokens_and_others_wait(found):
    assert found["aborted"] == ["aborted", "completed"]
    assert found["waits"]
    assert found["continued"] == "completed"


def test_verl_s_comparison_fails_closed(found):
    assert found["metrics"]["training/rollout_probs_diff_max"] == 0.0
    assert found["differs"].startswith(
        "old_log_probs must be equal to rollout_log_probs with TOOLKIT_VERL_CHECK, got 1 of 9 tokens that differ"
    )
    assert found["nan"] != ""


def test_the_actor_that_verl_builds_is_patched(found):
    assert found["numerics"] == "bitwise"
    assert found["padding"] == (
        "actor_rollout_ref.model.use_remove_padding must be False with the toolkit's actor, got True."
    )


def test_what_is_not_offered_is_a_sentence(found):
    assert found["parallel"].startswith("rollout.tensor_model_parallel_size must be 1 with rollout.name 'toolkit'")
    assert "got 'mood'." in found["unknown"]
    assert found["wire"] == "wire_format must be 'named_tensors' with rollout.name 'toolkit', got 'delta_flush'."
    assert not math.isnan(found["metrics"]["training/rollout_probs_diff_mean"])
