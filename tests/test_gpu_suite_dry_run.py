"""The GPU suite on a machine without one: every section runs, at tiny sizes, in Triton's interpreter."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton")

from benchmarks.gpu import suite

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("chosen", [["linear", "memory_bound"], pytest.param(None, marks=pytest.mark.sweep)], ids=str)
def test_sections_run(chosen):
    """Some, and in the sweep every one."""
    environment = os.environ | {
        "TOOLKIT_GPU_TESTS": "cpu", "TRITON_INTERPRET": "1", "TOOLKIT_NATIVE": "off", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    only = ["--only", *chosen] if chosen else []
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", *only]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    summary = next(line for line in finished.stdout.splitlines() if "a dry run of" in line)
    assert summary.split("a dry run of ")[1].split(", ") == (chosen or list(suite.sections()))
    assert "left out" not in finished.stdout


def test_a_failing_test_withholds_what_it_covers():
    failed = [["test_bounds_linear_logprob", "test_linear_logprob[plain]"], ["test_bounds_sample", "crashed"]]
    held = {name for name in suite.sections() if suite.withheld(name, failed)}
    assert held == {"linear_logprob", "sample", "training", "generation"}
    assert suite.withheld("linear", [["test_bounds_gemm", "test_linear[512-4224-triton-float32]"]])
    assert not suite.withheld("memory_bound", failed)


def test_the_tests_that_are_watched_exist():
    names = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert {file for watched in suite.WATCHED.values() for file in watched} <= names


def test_a_report_that_is_missing_is_a_failure(tmp_path):
    outcome = {"tests": 0, "skipped": 0, "failed": [], "recorded": {}, "seconds_of": {}}
    suite.read_report("test_gpu", tmp_path / "none.xml", outcome)
    assert outcome["failed"] == [["test_gpu", "crashed"]]
    report = tmp_path / "some.xml"
    report.write_text(
        '<testsuites><testsuite tests="4" skipped="1" time="2.5"><testcase classname="c" name="a"><properties>'
        '<property name="heights" value="7"/></properties></testcase>'
        '<testcase classname="c" name="b"><failure/></testcase><testcase classname="c" name="c"><skipped/></testcase>'
        '<testcase classname="" name="tests.ops.test_bounds_rowwise"><error/></testcase></testsuite></testsuites>'
    )
    suite.read_report("test_bounds_rowwise", report, outcome)
    assert (outcome["tests"], outcome["skipped"], outcome["recorded"]) == (4, 1, {"a heights": "7"})
    assert outcome["failed"][1:] == [["test_bounds_rowwise", "b"], ["test_bounds_rowwise", "crashed"]]


def test_a_budget_leaves_out_what_does_not_fit_and_cuts_off_what_hangs():
    from benchmarks.gpu.device import Budget

    budget = Budget(0.5)
    assert not budget.allows("long", 3.0)
    assert budget.left_out == ["long"]
    with budget.trying("broken"):
        raise ValueError("why")
    assert "ValueError: why" in budget.failed["broken"]
    with pytest.raises(TimeoutError), budget.enforced(grace=0.0):
        time.sleep(60)
