"""Kernels compiled for every target, without a GPU: no spills, matrix instructions, vector accesses.

``python -m tools.compile_kernels`` compiles every shipped tile; the cases here come nearest the limits, or stand for an
op. The first of each family belongs to every test run, all the others to the exhaustive one.
"""

import re
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from tests.helpers.compiler import Compiler
from toolkit.ops.tiles import GemmTile, TileTable, for_any_size
from tools.compile_kernels import compiler as kernels
from tools.compile_kernels import kernel_cases_attention, table

TARGETS = list(kernels.SHARED_LIMIT)
MATRIX = {
    "attention bf16 128 paged": TARGETS,
    "attention bf16 576/512 splits apart": TARGETS,
    "attention bf16 128 splits in turn": TARGETS,
    "attention_backward bf16 128": TARGETS,
    "attention bf16 256": ["sm_90"],
    "attention fp32 64 paged": ["sm_90", "gfx942"],
    "linear bf16 9728x2560": TARGETS,
    "linear bf16 2560x4096 few rows": ["sm_90"],
    "linear bf16 uneven": ["sm_80"],
    "linear fp32 9728x2560": ["gfx942"],
    "lora_add bf16 9728x2560 rank 64": ["sm_90"],
    "linear_logprob bf16 151936x2560": ["sm_90"],
    "linear_logprob bf16 all options": ["sm_100"],
    "experts bf16 2880x2880 interleaved": TARGETS,
    "experts bf16 uneven interleaved": ["sm_90"],
    "experts fp32 2048x768": ["sm_80"],
}
ROWWISE = {
    "activation gelu bf16 4096": ["sm_90"],
    "gated_activation clamped_swiglu bf16 4096": ["sm_90", "gfx942"],
    "gated_activation silu fp32 512": ["sm_90"],
    "rotary half bf16 4096": ["sm_90", "sm_100"],
    "rotary interleaved bf16 4096": ["sm_90"],
    "rotary_tables axes fp32 128": ["sm_90", "gfx942"],
    "rotary_write normed bf16 128": ["sm_90", "gfx942"],
    "add_rms_norm bf16 8192": ["sm_80", "sm_90", "gfx942"],
    "add_rms_norm fp32 512": ["sm_90"],
    "layer_norm bf16 4096": ["sm_90", "gfx942"],
    "layer_norm bf16 16384": ["sm_90"],
    "token_logprob bf16 151936": ["sm_90"],
    "state_write fp32 512": ["sm_90"],
    "route bf16 256 sigmoid in groups": ["sm_90"],
    "dispatch_plan 512": ["sm_90"],
    "linear_recurrence delta bf16 128 128": ["sm_80", "sm_90", "gfx942"],
    "linear_recurrence ssd fp32 256 64": ["sm_90", "sm_100"],
    "linear_recurrence_paged delta bf16 128 128": ["sm_90", "gfx942"],
    "linear_recurrence keys bf16 128 128": ["sm_90", "gfx942"],
    "linear_recurrence scan bf16 16 1": ["sm_80", "sm_90", "gfx942"],
    "causal_conv bf16 8192 4": ["sm_80", "sm_90", "gfx942"],
    "causal_conv fp32 600 4": ["sm_100"],
    "causal_conv_paged bf16 8192 4": ["sm_90", "gfx942"],
    "sample bf16 151936": TARGETS,
    "penalize bf16 151936": TARGETS,
}
# Kernels that move nothing but rows, which they must in accesses of 16 bytes (the last, of float32 to bfloat16, in 8).
STREAMING = ("activation", "gated_activation", "rotary half bf16", "state_write")
# What every test run compiles; the rest is a sweep.
FIRST = {
    ("attention bf16 128 paged", "sm_90"),
    ("gated_activation clamped_swiglu bf16 4096", "sm_90"),
    ("causal_conv bf16 8192 4", "gfx942"),
}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    made = Compiler(str(tmp_path_factory.mktemp("triton")))
    yield made
    made.pool.shutdown()


def cases(names: dict[str, list[str]]) -> list:
    return [
        pytest.param(name, arch, marks=[] if (name, arch) in FIRST else [pytest.mark.sweep])
        for name, targets in names.items()
        for arch in targets
    ]


def expects_matrix_instructions(name: str, arch: str, made: kernels.Compiled) -> bool:
    """Whether a kernel's products must use them: NVIDIA's have no IEEE float32, which is multiply-add on purpose."""
    if name.startswith("attention"):
        return made.kernel != "attention_join" and ("fp32" not in name or arch.startswith("gfx"))
    if name.startswith("experts"):
        return made.dots > 0 and ("bf16" in name or arch.startswith("gfx"))
    return made.dots > 0


@pytest.mark.parametrize(("name", "arch"), cases(MATRIX))
def test_compiles_to_matrix_instructions_without_spills(name, arch, compiler):
    compiled, _ = compiler.compile(name, arch)
    for made in compiled:
        if name.startswith("attention") and made.kernel != "attention_join":
            assert made.dots > 0, made
        if expects_matrix_instructions(name, arch, made):
            assert sum(made.matrix.values()) > 0, made
    wanted = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}.get(arch)
    if wanted and name.startswith("experts bf16 2880"):
        assert all(wanted in made.matrix for made in compiled if made.dots)
    elif wanted and "bf16" in name and not name.startswith("experts"):
        assert any(wanted in made.matrix for made in compiled)


@pytest.mark.parametrize(("name", "arch"), cases(ROWWISE))
def test_compiles_without_spills_in_vector_accesses(name, arch, compiler):
    compiled, assembly = compiler.compile(name, arch)
    if name.startswith("sample"):
        digits = ["count_digit"] * 4 + ["weigh"] + ["weigh_digit"] * 7
        assert [made.kernel for made in compiled] == ["best_of_part", "plan_row", *digits, "keep", "choose"]
    if name.startswith("penalize"):
        assert [made.kernel for made in compiled] == ["mark_history", "penalize_block"]
    if arch != "gfx942" and name.startswith(STREAMING):
        for text in assembly:
            narrow = set(re.findall(r"\b(?:ld|st)\.global\S*", text)) - {"ld.global.v4.b32", "st.global.v4.b32"}
            assert narrow <= ({"ld.global.b64", "st.global.v2.b32"} if "state_write" in name else set()), narrow


def test_spills_and_missing_matrix_instructions_are_seen(compiler):
    """The report itself has power: a tile too large for sm_80 spills, and float32 has no GEMM."""
    spilling = compiler.run(attention_of_tile, GemmTile(64, 64, 0, 4, 2), torch.bfloat16, 128, True)
    assert spilling.spilled > 0
    assert compiler.run(attention_of_tile, GemmTile(16, 16, 0, 4, 1), torch.float32, 16, False).matrix == {}


def attention_of_tile(tile: GemmTile, dtype: torch.dtype, head_dim: int, paged: bool) -> kernels.Compiled:
    from toolkit.ops.attention import tiles

    case = kernel_cases_attention.attention_case(dtype, head_dim, paged=paged)
    table = TileTable("attention", for_any_size({"sm_80": {dtype.itemsize: tile}}))
    with mock.patch.object(tiles, "FORWARD", table):
        (made,) = kernels.compile_case(case, "sm_80")
    return made


ROWWISE_OPS = [
    "activation", "layer_norm", "rms_norm", "rotary", "state_write", "token_logprob", "gated_activation",
    "add_rms_norm", "rotary_tables", "rotary_write",
]  # fmt: skip
RECURRENT_OPS = ["linear_recurrence", "causal_conv"]


def test_every_case_has_its_own_name_and_every_op_its_cases():
    names = list(table.cases())
    for op in [*ROWWISE_OPS, *RECURRENT_OPS, *(f"{op}_paged" for op in RECURRENT_OPS)]:
        for dtype in ("bf16", "fp32"):
            assert any(name.startswith(op + " ") and f" {dtype} " in f"{name} " for name in names), (op, dtype)
    assert {*MATRIX, *ROWWISE} <= set(names)
    assert {(name, arch) for name, archs in (MATRIX | ROWWISE).items() for arch in archs} >= FIRST
