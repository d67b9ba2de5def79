"""The committed table of what every kernel compiles to: of this tree, complete, and without a kernel unfit to ship.

Compiling all of it takes minutes; the table carries a fingerprint of the code that it was made from, and single cases
are compiled afresh in the tests of their ops.
"""

from functools import cache

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton")

from tools.compile_kernels import compiler, table

# NVIDIA's matrix units have no IEEE float32 product: there float32 is multiply-add on purpose.
NO_MATRIX = "fp32"
# Kernels whose products have a side below 64 rows, which warp-group instructions do not take.
WGMMA = {"linear_forward": 128, "attention_forward": 64}


@cache
def committed() -> tuple[str, list[tuple[str, compiler.Compiled]]]:
    return table.read()


def rows() -> list[tuple[str, compiler.Compiled]]:
    return committed()[1]


def test_is_of_this_tree():
    assert committed()[0] == table.fingerprint(), "kernels changed: run python -m tools.compile_kernels"


def test_is_complete():
    have = {(case, made.arch) for case, made in rows()}
    assert have == {(name, arch) for name in table.cases() for arch in compiler.SHARED_LIMIT}


def test_nothing_spills_or_takes_too_much_shared_memory():
    unfit = {(made.kernel, made.arch, fault) for _, made in rows() for fault in compiler.faults(made)}
    assert not unfit


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
