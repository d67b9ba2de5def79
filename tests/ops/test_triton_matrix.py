"""The Triton matrix kernels without a GPU: interpreted against fp64, and compiled for every target."""

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton")

from tests.helpers.compiler import compile_fit, run_interpreted

from tools.compile_kernels import compiler
from tools.compile_kernels.kernel_cases_matrix import cases

# `python -m tools.compile_kernels` compiles every shipped tile; these are the ones that come nearest the limits.
CHOSEN = [
    *(("linear bf16 9728x2560", arch) for arch in compiler.SHARED_LIMIT),
    ("linear bf16 uneven", "sm_80"),
    ("linear fp32 9728x2560", "gfx942"),
    ("lora_add bf16 9728x2560 rank 64", "sm_90"),
    ("linear_logprob bf16 151936x2560", "sm_90"),
    ("linear_logprob bf16 all options", "sm_100"),
]


def test_interpreted():
    run_interpreted("linear", "lora_linear", "linear_logprob", "linear_cross_entropy")


@pytest.mark.parametrize(("name", "arch"), CHOSEN)
def test_compiles_to_matrix_instructions_without_spills(name, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_fit(cases()[name], arch)
    for made in compiled:
        if made.dots:
            assert sum(made.matrix.values()) > 0, made
    if arch == "sm_90":
        assert any("wgmma.mma_async" in made.matrix for made in compiled)
    if arch == "sm_100":
        assert any("tcgen05.mma" in made.matrix for made in compiled)
