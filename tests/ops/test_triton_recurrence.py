"""The Triton kernels of the recurrent ops without a GPU: interpreted against fp64, and compiled."""

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton")

from tests.helpers.compiler import compile_fit, run_interpreted

from tools.compile_kernels.kernel_cases_recurrence import cases

OPS = ["linear_recurrence", "causal_conv"]
# `python -m tools.compile_kernels` compiles every shipped tile for every target; these stand for them.
CASES = {
    "linear_recurrence delta bf16 128 128": ["sm_80", "sm_90", "gfx942"],
    "linear_recurrence ssd fp32 256 64": ["sm_90", "sm_100"],
    "linear_recurrence_paged delta bf16 128 128": ["sm_90", "gfx942"],
    "causal_conv bf16 8192 4": ["sm_80", "sm_90", "gfx942"],
    "causal_conv fp32 600 4": ["sm_100"],
    "causal_conv_paged bf16 8192 4": ["sm_90", "gfx942"],
}


def test_interpreted():
    run_interpreted(*OPS)


@pytest.mark.parametrize(("name", "arch"), [(name, arch) for name, archs in CASES.items() for arch in archs])
def test_compiles_without_spills(name, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compile_fit(cases()[name], arch)


def test_every_op_has_its_cases():
    names = list(cases())
    for op in OPS:
        for form in (op, f"{op}_paged"):
            for dtype in ("bf16", "fp32"):
                assert any(name.startswith(form + " ") and f" {dtype} " in name for name in names), (form, dtype)
    assert set(CASES) <= set(names)
