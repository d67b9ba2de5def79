"""The GPU tests as a section: tests/gpu and tests/ops/test_bounds_*, one process per file.

A failing test marks the figures of the sections that it covers (``SECTIONS`` in ``section.py``).
"""

import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import DRY
from benchmarks.gpu.section import Section

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"


def gpu_test_files() -> list[Path]:
    """The files of the GPU tests."""
    found = [*(TESTS / "ops").glob("test_bounds_*.py"), *(TESTS / "gpu").glob("test_*.py")]
    recurrences = (TESTS / "ops" / f"test_linear_recurrence{form}.py" for form in ("", "_chunked"))
    return sorted([*found, *recurrences])


def bench_tests(section: Section) -> None:
    """Counts, failures and what tests recorded. All files run at once: compilers take most of their time.

    A file whose process ends without a report, or takes too long, counts as one failure named ``crashed``.
    """
    assert section.path is not None, "run by benchmarks.gpu.section"
    folder = section.path.parent
    outcome = section.result
    outcome |= {"tests": 0, "skipped": 0, "failed": [], "recorded": {}, "seconds_of": {}}
    running = {}
    marks, files = ["-m", "gpu"], gpu_test_files()
    if DRY:  # one test, since all of them take minutes in the interpreter
        marks, files = ["-k", "triton and without_a_distribution"], [TESTS / "ops" / "test_bounds_sample.py"]
    for path in files:
        report, log = folder / f"{path.stem}.xml", folder / f"{path.stem}.log"
        command = [sys.executable, "-m", "pytest", str(path), *marks, "-ra", "--tb=short", "--durations=5"]
        with log.open("w") as out:
            # In this section's process group, so that what ends the section ends them and the compiler's helpers.
            process = subprocess.Popen([*command, f"--junitxml={report}"], cwd=ROOT, stdout=out, stderr=out)
        running[path.stem] = (process, report, log)
    try:
        waiting = dict(running)
        while waiting and section.left() > 0:
            for file, (process, report, _) in list(waiting.items()):
                if process.poll() is not None:
                    del waiting[file]
                    read_report(file, report, outcome)
                    section.write()
            time.sleep(0.2)
    finally:
        for file, (process, report, log) in running.items():
            if process.poll() is None:
                process.kill()
                process.wait()
                read_report(file, report, outcome)
            print(f"{file}:", *log.read_text().splitlines()[-60:], sep="\n", flush=True)


def read_report(file: str, report: Path, outcome: dict[str, Any]) -> None:
    """Add what a JUnit report says to ``outcome``."""
    if not report.exists():
        outcome["failed"].append([file, "crashed"])
        return
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    outcome["tests"] += int(suite.get("tests", 0))
    outcome["skipped"] += int(suite.get("skipped", 0))
    outcome["seconds_of"][file] = float(suite.get("time", 0.0))
    for case in suite.iter("testcase"):
        name = case.get("name", "") if case.get("classname") else "crashed"  # a file that could not be imported
        if case.find("failure") is not None or case.find("error") is not None:
            outcome["failed"].append([file, name])
        for found in case.iter("property"):
            outcome["recorded"][f"{name} {found.get('name')}"] = found.get("value")
    report.unlink()


def show(result: dict[str, Any], ceilings: dict[str, float]) -> None:
    ran = result["tests"] - result["skipped"]
    print(f"GPU tests: {ran} ran, {len(result['failed'])} failed, {result['skipped']} skipped")
