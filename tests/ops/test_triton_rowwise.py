"""The row-wise Triton kernels without a GPU: interpreted against fp64, and compiled."""

import re

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton")

import triton
from tests.helpers.compiler import compile_fit, run_interpreted

from tools.compile_kernels.kernel_cases_rowwise import cases

OPS = ["activation", "layer_norm", "rms_norm", "rotary", "state_write", "token_logprob"]
# `python -m tools.compile_kernels` compiles every shipped tile for every target; these stand for them.
CASES = {
    "activation gelu bf16 4096": ["sm_90"],
    "gated_activation clamped_swiglu bf16 4096": ["sm_90", "gfx942"],
    "gated_activation silu fp32 512": ["sm_90"],
    "rotary half bf16 4096": ["sm_90", "sm_100"],
    "rotary interleaved bf16 4096": ["sm_90"],
    "rotary_tables axes fp32 128": ["sm_90", "gfx942"],
    "add_rms_norm bf16 8192": ["sm_80", "sm_90", "gfx942"],
    "add_rms_norm fp32 512": ["sm_90"],
    "layer_norm bf16 4096": ["sm_90", "gfx942"],
    "layer_norm bf16 16384": ["sm_90"],
    "token_logprob bf16 151936": ["sm_90"],
    "state_write fp32 512": ["sm_90"],
}
# Kernels that move nothing but rows, which they must in accesses of 16 bytes (the last, of float32 to bfloat16, in 8).
STREAMING = {"activation", "gated_activation", "rotary half bf16", "state_write"}


def test_interpreted():
    run_interpreted(*OPS)


@pytest.mark.parametrize(("name", "arch"), [(name, arch) for name, archs in CASES.items() for arch in archs])
def test_compiles_without_spills_in_wide_accesses(name, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assembly, compile = [], triton.compile

    def recorded(*args, **options):
        made = compile(*args, **options)
        assembly.append(made.asm.get("ptx", ""))
        return made

    monkeypatch.setattr(triton, "compile", recorded)
    compile_fit(cases()[name], arch)
    if arch != "gfx942" and any(name.startswith(op) for op in STREAMING):
        for text in assembly:
            narrow = set(re.findall(r"\b(?:ld|st)\.global\S*", text)) - {"ld.global.v4.b32", "st.global.v4.b32"}
            assert narrow <= ({"ld.global.b64", "st.global.v2.b32"} if "state_write" in name else set()), narrow


def test_every_case_has_its_own_name_and_every_op_its_cases():
    names = list(cases())
    for op in [*OPS, "gated_activation", "add_rms_norm", "rotary_tables"]:
        for dtype in ("bf16", "fp32"):
            assert any(name.startswith(op + " ") and dtype in name for name in names), (op, dtype)
    assert set(CASES) <= set(names)
