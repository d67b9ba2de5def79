"""The Triton kernels of a mixture of experts without a GPU: interpreted against fp64, and compiled for every target."""

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton")

from tests.helpers.compiler import compile_fit, run_interpreted

from tools.compile_kernels import compiler
from tools.compile_kernels.kernel_cases_moe import cases

# `python -m tools.compile_kernels` compiles every shipped tile; these are the ones that come nearest the limits.
CHOSEN = [
    *(("experts bf16 2880x2880 interleaved", arch) for arch in compiler.SHARED_LIMIT),
    ("experts bf16 uneven interleaved", "sm_90"),
    ("experts fp32 2048x768", "sm_80"),
    ("route bf16 256 sigmoid in groups", "sm_90"),
    ("dispatch_plan 512", "sm_90"),
]


@pytest.mark.parametrize("part", ["routing", "products", "experts"])
def test_interpreted(part):
    run_interpreted(f"moe_{part}")


@pytest.mark.parametrize(("name", "arch"), CHOSEN)
def test_compiles_to_matrix_instructions_without_spills(name, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_fit(cases()[name], arch)
    for made in compiled:
        if made.dots and ("bf16" in name or arch.startswith("gfx")):
            assert sum(made.matrix.values()) > 0, made
    if "2880" in name and arch in ("sm_90", "sm_100"):
        wanted = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}[arch]
        assert all(wanted in made.matrix for made in compiled if made.dots)
