"""The committed table of what every kernel compiles to: of this tree, complete, and without a kernel unfit to ship.

Compiling all of it takes minutes; each case carries a digest of the code and the launches that it was made from, and
single cases are compiled afresh in the tests of their ops.
"""

import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton")

from tests.helpers.compiler import Compiler
from tools.compile_kernels import budgets, compiler, fingerprints, loops, table

# NVIDIA's matrix units have no IEEE float32 product: there float32 is multiply-add on purpose.
NO_MATRIX = "fp32"
# Kernels whose products have a side below 64 rows, which warp-group instructions do not take.
WGMMA = {"linear_forward": 128, "attention_forward": 64}


@cache
def committed() -> tuple[dict[tuple[str, str], str], list[tuple[str, compiler.Compiled]]]:
    return table.read()


def rows() -> list[tuple[str, compiler.Compiled]]:
    return committed()[1]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    made = Compiler(str(tmp_path_factory.mktemp("triton")))
    yield made
    made.pool.shutdown()


def test_is_of_this_tree(process):
    assert process.run(table.stale) == [], "kernels changed: run python -m tools.compile_kernels"


def test_is_complete():
    have = {(case, made.arch) for case, made in rows()}
    assert have == {(name, arch) for name in table.cases() for arch in compiler.SHARED_LIMIT}


def test_nothing_spills_or_takes_too_much_shared_memory():
    unfit = {(made.kernel, made.arch, fault) for _, made in rows() for fault in compiler.faults(made)}
    assert not unfit


def test_no_kernel_takes_more_than_its_budget():
    assert budgets.over(rows(), budgets.read()) == []


def test_what_is_over_its_budget_is_named():
    case, made = rows()[0]
    limits = budgets.budgets_of([(case, made)])
    assert budgets.over([(case, made)], limits) == []
    for name in budgets.LIMITS:
        more = compiler.Compiled(**{**vars(made), name: getattr(made, name) + 1})
        (sentence,) = budgets.over([(case, more)], limits)
        assert sentence.startswith(f"{made.kernel}, {made.arch}, case {case}: {name} ")
    assert "no budget" in budgets.over([(case, compiler.Compiled(**{**vars(made), "kernel": "other"}))], limits)[0]


def test_a_smaller_share_of_matrix_instructions_is_named():
    case, made = rows()[0]
    better, worse = (compiler.Compiled(**{**vars(made), "loop": loop}) for loop in ([543, 12], [512, 8]))
    limits = budgets.budgets_of([(case, better)])
    assert limits[made.kernel][made.arch][budgets.DOT_SHARE] == 2.2
    assert budgets.over([(case, better)], limits) == []
    (sentence,) = budgets.over([(case, worse)], limits)
    assert sentence == f"{made.kernel}, {made.arch}, case {case}: dot_share 1.56 %, at least 2.2 %"
    assert budgets.budgets_of([(case, worse), (case, better)]) == budgets.budgets_of([(case, better), (case, worse)])


def test_more_instructions_in_the_inner_loop_are_named():
    case, made = rows()[0]
    few, more, none = (compiler.Compiled(**{**vars(made), "loop": loop}) for loop in ([400, 8], [600, 12], []))
    limits = budgets.budgets_of([(case, few), (case, none)])
    assert limits[made.kernel][made.arch][budgets.INSTRUCTIONS] == 400
    assert budgets.over([(case, few), (case, none)], limits) == []
    (sentence,) = budgets.over([(case, more)], limits)
    assert sentence == f"{made.kernel}, {made.arch}, case {case}: instructions 600, budget 400"


NVIDIA_LISTING = """
        /*0000*/                   MOV R1, R2 ;         /* 0x0000000000608947 */
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR20], RZ, !UPT ;  /* 0x00e0 */
                                                        /* 0x000fe200078e00ff */
        /*0020*/              @!P0 BRA 0x60 ;           /* 0x0000000000608947 */
        /*0030*/                   FADD R1, R1, R2 ;    /* 0x0000000000608947 */
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR20], R88, gsb0 ; /* 0x00e0 */
        /*0050*/               @P1 BRA 0x30 ;           /* 0xfffffffc00ac8947 */
        /*0060*/               @P2 BRA P6, 0x0 ;        /* 0xfffffffc00ac8947 */
        /*0070*/                   BRA 0x70;            /* 0xfffffffc00fc7947 */
"""
AMD_ASSEMBLY = """
\t.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
kernel:
\ts_mov_b32 s0, s1
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tv_mfma_f32_32x32x8_bf16 v[34:49], v[118:119], v[66:67], 0
\t; a comment
\ts_cbranch_scc1 .LBB0_2
\ts_branch .LBB0_1
.LBB0_2:
\ts_endpgm
"""


def test_the_inner_loop_of_a_listing():
    assert loops.nvidia_loop(NVIDIA_LISTING) == loops.Loop(3, 1)
    assert loops.nvidia_loop(NVIDIA_LISTING.replace("HGMMA", "FFMA")) is None
    assert loops.amd_loop(AMD_ASSEMBLY) == loops.Loop(3, 1)
    assert loops.amd_loop(AMD_ASSEMBLY.replace("s_branch .LBB0_1", "s_branch .LBB0_2")) is None


def test_products_use_matrix_instructions():
    plain = {
        (case, made.kernel, made.arch)
        for case, made in rows()
        if made.dots and not made.matrix and (NO_MATRIX not in case or made.arch.startswith("gfx"))
    }
    assert not plain


@pytest.mark.parametrize("kernel", WGMMA)
@pytest.mark.parametrize(("arch", "instruction"), [("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma")])
def test_large_tiles_use_the_largest_instructions(kernel, arch, instruction):
    found = [
        made
        for case, made in rows()
        if (made.kernel, made.arch) == (kernel, arch) and "bf16" in case and "uneven" not in case
    ]
    assert found
    assert all(instruction in made.matrix for made in found)


def test_faults_are_seen():
    fit = rows()[0][1]
    spilling = compiler.Compiled(**{**vars(fit), "spilled": 8})
    large = compiler.Compiled(**{**vars(fit), "shared": compiler.SHARED_LIMIT[fit.arch] + 1})
    assert compiler.faults(fit) == []
    assert compiler.faults(spilling) == ["spills 8"]
    assert compiler.faults(large)


def test_occupancy():
    assert compiler.occupancy("sm_90", 32, 0, 4) == 1.0
    assert compiler.occupancy("sm_90", 255, 0, 8) == 8 / 64  # 65,280 registers a program
    assert compiler.occupancy("sm_80", 32, 100_000, 4) == 4 / 64
    assert compiler.occupancy("gfx942", 512, 0, 4) == 4 / 32
    assert compiler.occupancy("gfx942", 64, 32768, 4) == 8 / 32


KERNEL = '''
import triton
import triton.language as tl

FACTOR = tl.constexpr(2)
UNUSED = 5


@triton.jit
def inner(x):
    return x * FACTOR


@triton.jit
def outer(x, SIZE: tl.constexpr):
    """What it does."""
    return inner(x) + SIZE  # and why
'''


def digest_of(path: Path) -> str:
    spec = importlib.util.spec_from_file_location("digested", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return fingerprints.of_kernel(module.outer)


SAME = {
    "comment": ("  # and why", ""),
    "docstring": ('"What it does."', '"Other words."'),
    "value of another": ("UNUSED = 5", "UNUSED = 6"),
    "layout": ("return inner(x) + SIZE", "return (\n        inner(x) + SIZE)"),
}
OTHER = {
    "body": ("+ SIZE", "- SIZE"),
    "callee": ("x * FACTOR", "x + FACTOR"),
    "constant": ("constexpr(2)", "constexpr(3)"),
    "option": ("@triton.jit\ndef outer", "@triton.jit(do_not_specialize=['x'])\ndef outer"),
}


def test_a_digest_is_of_the_code_of_a_kernel_and_all_it_calls(process, tmp_path):
    def changed(name: str, old: str = "", new: str = "") -> str:
        assert old in KERNEL
        path = tmp_path / f"{name.replace(' ', '_')}.py"
        path.write_text(KERNEL.replace(old, new) if old else KERNEL)
        return process.run(digest_of, path)

    made = changed("as it is")
    assert {name for name, change in SAME.items() if changed(name, *change) != made} == set()
    assert {name for name, change in OTHER.items() if changed(name, *change) == made} == set()


def test_a_digest_is_of_the_launch_too(process):
    cases = "linear bf16 4096x2560", "linear fp32 4096x2560", "linear bf16 uneven"
    pairs = [(case, arch) for case in cases for arch in ("sm_90", "gfx942")]
    made = process.run(table.made_from, pairs)
    assert len(set(made.values())) == len(pairs)
    assert process.run(table.made_from, pairs) == made
