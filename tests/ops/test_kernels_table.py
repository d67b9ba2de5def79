"""The committed table of what every kernel compiles to: of this tree, complete, and without a kernel unfit to ship.

Compiling all of it takes minutes; the table carries a fingerprint of the code that it was made from, and single cases
are compiled afresh in the tests of their ops.
"""

import json
from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton")

from benchmarks import kernels

TABLE = kernels.ROOT / "benchmarks" / "results" / "kernels.json"
# NVIDIA's matrix units have no IEEE float32 product: there float32 is multiply-add on purpose.
NO_MATRIX = "fp32"
# Kernels whose products have a side below 64 rows, which warp-group instructions do not take.
WGMMA = {"linear_forward": 128, "attention_forward": 64}


@cache
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def rows() -> list[kernels.Compiled]:
    return [kernels.Compiled(**{k: v for k, v in row.items() if k != "case"}) for row in table()["kernels"]]


def test_is_of_this_tree():
    assert table()["fingerprint"] == kernels.fingerprint(), "kernels changed: run python -m benchmarks.kernels"


def test_is_complete():
    have = {(row["case"], row["arch"]) for row in table()["kernels"]}
    assert have == {(name, arch) for name in kernels.cases() for arch in kernels.SHARED_LIMIT}


def test_nothing_spills_or_takes_too_much_shared_memory():
    unfit = {(made.kernel, made.arch, fault) for made in rows() for fault in kernels.faults(made)}
    assert not unfit


def test_products_use_matrix_instructions():
    plain = {
        (row["case"], row["kernel"], row["arch"])
        for row in table()["kernels"]
        if row["dots"] and not row["matrix"] and (NO_MATRIX not in row["case"] or row["arch"].startswith("gfx"))
    }
    assert not plain


@pytest.mark.parametrize("kernel", WGMMA)
@pytest.mark.parametrize(("arch", "instruction"), [("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma")])
def test_large_tiles_use_the_largest_instructions(kernel, arch, instruction):
    found = [row for row in table()["kernels"] if row["kernel"] == kernel and row["arch"] == arch]
    found = [row for row in found if "bf16" in row["case"] and "uneven" not in row["case"]]
    assert found
    assert all(instruction in row["matrix"] for row in found)


def test_faults_are_seen():
    fit = rows()[0]
    spilling = kernels.Compiled(**{**vars(fit), "spilled": 8})
    large = kernels.Compiled(**{**vars(fit), "shared": kernels.SHARED_LIMIT[fit.arch] + 1})
    assert kernels.faults(fit) == []
    assert kernels.faults(spilling) == ["spills 8"]
    assert kernels.faults(large)


def test_occupancy():
    assert kernels.occupancy("sm_90", 32, 0, 4) == 1.0
    assert kernels.occupancy("sm_90", 255, 0, 8) == 8 / 64  # 65,280 registers a program
    assert kernels.occupancy("sm_80", 32, 100_000, 4) == 4 / 64
    assert kernels.occupancy("gfx942", 512, 0, 4) == 4 / 32
    assert kernels.occupancy("gfx942", 64, 32768, 4) == 8 / 32
