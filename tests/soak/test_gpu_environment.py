"""The GPU suite with other packages: torch 2.11, Triton 3.6, transformers 5.17, without pydantic and TRL.

The environment has PyPI's torch, a CUDA build: a few gigabytes, made once where ``TOOLKIT_CLIENT_ENVIRONMENTS`` names a
folder to keep it in.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.client_environments import ROOT, client_environment

PACKAGES = [
    "torch==2.11.0", "triton==3.6.0", "transformers==5.17.0", "numpy>=2.4", "safetensors", "accelerate", "rich", "peft",
    "pyyaml", "pytest", "pytest-timeout", "hypothesis",
]  # fmt: skip
TESTS = ["test_linear", "test_linear_logprob_kernels", "test_sample", "test_attention_long", "test_attention_trees"]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return client_environment(tmp_path_factory.mktemp("environments"), "gpu", PACKAGES)


def run(python: str, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_gpu_suite_runs_dry(python: str, tmp_path: Path) -> None:
    run(python, "benchmarks.gpu", "--dry-run", "--output", str(tmp_path))
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["versions"]["torch"].startswith("2.11.0")
    assert written["versions"]["triton"] == "3.6.0"
    assert {report["status"] for report in written["sections"].values()} == {"finished"}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_kernels_are_right_in_the_interpreter_of_triton_3_6(python: str) -> None:
    files = [f"tests/ops/{name}.py" for name in TESTS]
    assert " passed" in run(python, "pytest", "-q", "-k", "triton or attention", *files)
