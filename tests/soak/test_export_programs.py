"""ONNX Runtime, OpenVINO, ExecuTorch and torch run exported programs with the model's log-probabilities."""

import os
from pathlib import Path

import pytest

from tests.helpers.client_environments import ROOT, client_environment, run_script

PACKAGES = ("onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0", "openvino==2026.4.1", "executorch==1.5.1")
PROGRAMS = ("torch-export", "onnx", "openvino", "executorch")
FAMILIES = {"llama": PROGRAMS, "lfm2": PROGRAMS[:3]}
BOUND = 1e-3
"""Of the difference of a log-probability of float32 weights; tokens must agree beyond ten times that."""
PATH = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return client_environment(tmp_path_factory.mktemp("environment"), "programs", PACKAGES, beside=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_runtimes_have_the_models_log_probabilities(family: str, python: str, tmp_path: Path) -> None:
    out = tmp_path / "exports"
    out.mkdir()
    arguments = family, str(out), "24", str(BOUND), *FAMILIES[family]
    found = run_script(python, "export_programs.py", tmp_path, *arguments, PYTHONPATH=PATH)
    for target, seen in found.items():
        print(family, target, seen)
        assert "refused" not in seen
        assert seen["largest"] < BOUND
        assert seen["other_argmax"] == 0 < seen["decided"]
        assert seen["tokens_equal"]
