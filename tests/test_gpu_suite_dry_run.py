"""The GPU suite on a machine without one: every section runs, at tiny sizes, in Triton's interpreter."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from benchmarks.gpu import gate, section, suite, tables

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | suite.INTERPRETED


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


# Sections that share a process here, since imports take longer than a dry run.
TOGETHER = {
    "decode": ["decode"],
    "training": ["training"],
    "grpo": ["grpo"],
    "GEMMs": ["ceilings", "row_bits", "tile_invariance", "attention", "linear", "linear_logprob", "lora_linear"],
    "others": ["moe", "recurrence", "sample", "memory_bound", "tests"],
}
SEVERAL = """
import sys, pathlib
from benchmarks.gpu.section import run_section
for name in sys.argv[2:]:
    run_section(name, pathlib.Path(sys.argv[1]), 600.0)
"""


@pytest.mark.sweep
@pytest.mark.parametrize("names", TOGETHER.values(), ids=list(TOGETHER))
def test_sections_run(names, tmp_path, capsys):
    """To their ends, with every check passed; and their tables are printed."""
    ceilings = {"copy_bytes_per_s": 1.0, "bf16_flops_per_s": 1.0}
    (tmp_path / "ceilings.json").write_text(json.dumps({"result": ceilings}))
    command = [sys.executable, "-c", SEVERAL, str(tmp_path), *names]
    finished = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for name in names:
        report = json.loads((tmp_path / f"{name}.json").read_text())
        assert report["finished"], finished.stdout + finished.stderr
        assert (report["failed"], report["failed_checks"], report["left_out"]) == ({}, {}, []), name
        assert report["result"].get("failed", []) == []
        tables.show_section(name, report["result"], ceilings)
        shown = capsys.readouterr().out
        assert shown.strip()
        assert "not whole yet" not in shown


def test_every_section_runs_here():
    assert sorted(name for names in TOGETHER.values() for name in names) == sorted(section.SECTIONS)


@pytest.mark.sweep
def test_the_command_writes_its_results_and_keeps_other_sections(tmp_path):
    kept = {"status": "finished", "result": {"copy_bytes_per_s": 1.0, "bf16_flops_per_s": 1.0}}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"dry_run": True, "sections": {"ceilings": kept}}))
    finished = run("benchmarks.gpu", "--dry-run", "--only", "sample", "--output", str(tmp_path))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    written = json.loads(path.read_text())
    assert written["dry_run"]
    assert written["versions"]["torch"] == torch.__version__
    assert {name: report["status"] for name, report in written["sections"].items()} == {
        "ceilings": "finished", "sample": "finished",
    }  # fmt: skip
    assert written["sections"]["sample"]["result"]
    assert "rows x vocabulary size" in (tmp_path / "gpu.txt").read_text()
    assert "== sample ==" in (tmp_path / "gpu.log").read_text()


HANGING = """
import json, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
path = pathlib.Path(sys.argv[sys.argv.index("--folder") + 1]) / "linear.json"
aside = path.with_suffix(".tmp")
aside.write_text(json.dumps({"result": {"child": child.pid}, "failed_checks": {"gate": "why"}, "left_out": ["more"]}))
aside.replace(path)
time.sleep(600)
"""


def ended(pid: int) -> bool:
    """Whether a process has ended, be it waited for or not."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] in "ZX"


def test_a_section_that_hangs_is_killed_and_what_it_had_measured_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "command_of", lambda name, *rest: [sys.executable, "-c", HANGING, *map(str, rest)])
    monkeypatch.setattr(suite, "GRACE", 600.0)
    made = suite.Suite(tmp_path, tmp_path, True, 600.0)
    take = made.take

    def first_report(name, status):
        take(name, status)
        monkeypatch.setattr(suite, "GRACE", -10_000.0)  # its time is over as soon as it has written something

    monkeypatch.setattr(made, "take", first_report)
    made.run("linear")
    report = json.loads((tmp_path / "gpu.json").read_text())["sections"]["linear"]
    assert report["status"].startswith("killed after")
    assert report["marks"] == ["gate: why"]
    end = time.monotonic() + 30.0  # it was sent SIGKILL, and dies when it is scheduled
    while not ended(report["result"]["child"]) and time.monotonic() < end:
        time.sleep(0.02)
    assert ended(report["result"]["child"])
    assert any("killed" in line for line in suite.wrong(made.reports, ["linear"]))


def test_a_failed_test_marks_what_it_covers():
    failed = [["test_bounds_linear_logprob", "test_linear_logprob[plain]"], ["test_bounds_sample", "crashed"]]
    reports = {name: {"failed_checks": {}} for name in section.SECTIONS}
    reports["tests"]["result"] = {"failed": failed}
    marked = {name for name in section.SECTIONS if suite.marks(name, reports)}
    assert marked == {"linear_logprob", "sample", "decode", "training", "grpo"}
    assert suite.covers("linear", "test_bounds_gemm", "test_linear[512-4224-triton-float32]")
    assert not suite.covers("linear", "test_bounds_gemm", "test_lora_linear[512-4224-triton-float32]")


def test_the_tests_that_mark_sections_are_run():
    names = {path.stem for path in gate.gpu_test_files()}
    assert {file for planned in section.SECTIONS.values() for file in planned.tests} <= names
    assert all(path.exists() for path in gate.gpu_test_files())


def test_a_report_that_is_missing_is_a_failure(tmp_path):
    outcome = {"tests": 0, "skipped": 0, "failed": [], "recorded": {}, "seconds_of": {}}
    gate.read_report("test_gpu", tmp_path / "none.xml", outcome)
    assert outcome["failed"] == [["test_gpu", "crashed"]]
    report = tmp_path / "some.xml"
    report.write_text(
        '<testsuites><testsuite tests="4" skipped="1" time="2.5"><testcase classname="c" name="a"><properties>'
        '<property name="heights" value="7"/></properties></testcase>'
        '<testcase classname="c" name="b"><failure/></testcase><testcase classname="c" name="c"><skipped/></testcase>'
        '<testcase classname="" name="tests.ops.test_bounds_rowwise"><error/></testcase></testsuite></testsuites>'
    )
    gate.read_report("test_bounds_rowwise", report, outcome)
    assert (outcome["tests"], outcome["skipped"], outcome["recorded"]) == (4, 1, {"a heights": "7"})
    assert outcome["failed"][1:] == [["test_bounds_rowwise", "b"], ["test_bounds_rowwise", "crashed"]]


def test_a_section_keeps_what_a_failed_check_marks_and_names_what_does_not_fit(tmp_path):
    made = section.Section(0.5, tmp_path / "linear.json")
    assert not made.allows("long", 3.0)
    with made.trying("broken"):
        raise ValueError("why")
    one, nan = torch.ones(3), torch.full((3,), torch.nan)
    assert made.check("right", [one, one], [one, one], 1e-6) == 0.0
    assert made.check("wrong", [one, 2 * one, one], [one, one, one], 1e-6) == 1.0
    made.check("not a number", [one, nan], [one, one], 1e-6)
    made.result["seconds"] = 3.0
    made.write()
    report = json.loads((tmp_path / "linear.json").read_text())
    assert "ValueError: why" in report["failed"]["broken"]
    assert (set(report["failed_checks"]), report["left_out"]) == ({"wrong", "not a number"}, ["long"])
    assert (report["result"], report["finished"]) == ({"seconds": 3.0}, False)
