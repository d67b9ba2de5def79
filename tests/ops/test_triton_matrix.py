"""The Triton matrix kernels without a GPU: interpreted against fp64, and compiled for every target."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton")

from benchmarks import kernels
from benchmarks.kernel_cases_matrix import cases

FILES = ("interpreted_linear.py", "interpreted_lora_linear.py", "interpreted_linear_logprob.py")
# `python -m benchmarks.kernels` compiles every shipped tile; these are the ones that come nearest the limits.
CHOSEN = [
    *(("linear bf16 9728x2560", arch) for arch in kernels.SHARED_LIMIT),
    ("linear bf16 uneven", "sm_80"),
    ("linear fp32 9728x2560", "gfx942"),
    ("lora_add bf16 9728x2560 rank 64", "sm_90"),
    ("linear_logprob bf16 151936x2560", "sm_90"),
    ("linear_logprob bf16 all options", "sm_100"),
]


def test_interpreted():
    """All in one process of their own: triton reads TRITON_INTERPRET when it is imported."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", *(str(here / name) for name in FILES)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TOOLKIT_NATIVE": "off", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=here.parents[1], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " passed" in finished.stdout


@pytest.mark.parametrize(("name", "arch"), CHOSEN)
def test_compiles_to_matrix_instructions_without_spills(name, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = kernels.compile_case(cases()[name], arch)
    assert compiled
    for made in compiled:
        assert made.spilled == 0, made
        assert made.shared <= kernels.SHARED_LIMIT[arch], made
        if made.dots:
            assert sum(made.matrix.values()) > 0, made
    if arch == "sm_90":
        assert any("wgmma.mma_async" in made.matrix for made in compiled)
    if arch == "sm_100":
        assert any("tcgen05.mma" in made.matrix for made in compiled)
