"""The Triton sampling kernels without a GPU: interpreted against the specification, and compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from benchmarks import kernel_cases_sample, kernels


def test_interpreted():
    """In a process of its own: triton reads TRITON_INTERPRET when it is imported."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", str(here / "interpreted_sample.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TOOLKIT_NATIVE": "off", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=here.parents[1], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " passed" in finished.stdout


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_without_spills(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = kernels.compile_case(kernel_cases_sample.sample_case(torch.bfloat16, 151936), arch)
    compiled += kernels.compile_case(kernel_cases_sample.penalize_case(torch.bfloat16, 151936), arch)
    assert [made.kernel for made in compiled] == ["sample_row", "mark_history", "penalize_block"]
    for made in compiled:
        assert made.spilled == 0, made
        assert made.shared <= kernels.SHARED_LIMIT[arch], made
