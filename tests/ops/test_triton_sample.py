"""The Triton sampling kernels without a GPU: interpreted against the specification, and compiled."""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from tests.helpers.compiler import compile_fit, run_interpreted

from tools.compile_kernels import kernel_cases_sample


def test_interpreted():
    run_interpreted("sample")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_without_spills(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_fit(kernel_cases_sample.sample_case(torch.bfloat16, 151936), arch)
    compiled += compile_fit(kernel_cases_sample.penalize_case(torch.bfloat16, 151936), arch)
    assert [made.kernel for made in compiled] == ["sample_row", "mark_history", "penalize_block"]
