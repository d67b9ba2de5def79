"""The Triton attention kernels without a GPU: interpreted against fp64, and compiled for every target."""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from tests.helpers.compiler import compile_fit, run_interpreted

from tools.compile_kernels import compiler
from tools.compile_kernels import kernel_cases_attention as cases

# `python -m tools.compile_kernels` compiles every shipped tile; these are the ones that come nearest the limits.
CASES = {
    "paged bf16 128": (cases.attention_case(torch.bfloat16, 128, paged=True), list(compiler.SHARED_LIMIT)),
    "splits apart bf16 576": (
        cases.attention_case(torch.bfloat16, 576, paged=True, v_dim=512, heads=128, kv_heads=1, keys=cases.LONG),
        list(compiler.SHARED_LIMIT),
    ),
    "splits in turn bf16 128": (
        cases.attention_case(torch.bfloat16, 128, paged=True, tokens=1024, keys=cases.LONG),
        list(compiler.SHARED_LIMIT),
    ),
    "backward bf16 128": (cases.attention_backward_case(torch.bfloat16, 128), list(compiler.SHARED_LIMIT)),
    "contiguous bf16 256": (cases.attention_case(torch.bfloat16, 256, paged=False), ["sm_90"]),
    "paged fp32 64": (cases.attention_case(torch.float32, 64, paged=True), ["sm_90", "gfx942"]),
}


@pytest.mark.timeout(900)  # the interpreter is slow: minutes, beside other work
@pytest.mark.parametrize("name", ["attention", "attention_backward", "attention_forest", "attention_splits"])
def test_interpreted(name):
    run_interpreted(name)


@pytest.mark.parametrize(("name", "arch"), [(name, arch) for name, (_, archs) in CASES.items() for arch in archs])
def test_compiles_to_matrix_instructions_without_spills(name, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_fit(CASES[name][0], arch)
    for made in (made for made in compiled if made.kernel != "attention_join"):
        assert made.dots > 0, made
        # NVIDIA's matrix units have no IEEE float32 product: there it is multiply-add on purpose.
        if "fp32" not in name or arch.startswith("gfx"):
            assert sum(made.matrix.values()) > 0, made
    if arch == "sm_90" and "bf16" in name:
        assert any("wgmma.mma_async" in made.matrix for made in compiled)
    if arch == "sm_100" and "bf16" in name:
        assert any("tcgen05.mma" in made.matrix for made in compiled)


def test_spills_and_missing_matrix_instructions_are_seen(tmp_path, monkeypatch):
    """The report itself has power: a tile too large for sm_80 spills, and float32 has no matrix product."""
    from toolkit.ops.attention import tiles

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiles, "tile", lambda *_: tiles.Tile(64, 64, 4, 2))
    (made,) = compiler.compile_case(cases.attention_case(torch.bfloat16, 128, paged=True), "sm_80")
    assert made.spilled > 0
    monkeypatch.setattr(tiles, "tile", lambda *_: tiles.Tile(16, 16, 4, 1))
    (made,) = compiler.compile_case(cases.attention_case(torch.float32, 16, paged=False), "sm_80")
    assert made.matrix == {}
