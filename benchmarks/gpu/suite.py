"""GPU benchmarks and tests: ``python -m benchmarks.gpu`` (under eight minutes).

Every section is a separate process with a time limit: a kernel that hangs or an error that sticks to a process costs
that section alone, and what it had measured is kept. Figures come first, the tests of the kernels last; figures that a
failed correctness check or test covers are marked and not withheld. ``gpu.json``, ``gpu.txt`` and ``gpu.log`` in
``--output`` are written while it runs. Without a CUDA device it says so and exits with 2.
``--only`` measures some sections and keeps the others of the ``gpu.json`` that is there.
``--dry-run`` runs every section at tiny sizes on CPU tensors in Triton's interpreter, untimed.
"""

import argparse
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, describe, write_aside
from benchmarks.gpu.device import DRY
from benchmarks.gpu.section import SECTIONS
from benchmarks.gpu.tables import show
from toolkit.strict_json import strict_json

ROOT = Path(__file__).parents[2]
SECONDS = 465.0  # for everything
GRACE = 20.0  # after a section's seconds, until it is killed: a measurement under way may end
INTERPRETED = {"TOOLKIT_GPU_TESTS": "cpu", "TRITON_INTERPRET": "1", "TOOLKIT_NATIVE": "off", "OMP_NUM_THREADS": "1"}
DRY_SECONDS = 600.0
POLL = 0.2


class Suite:
    """The sections' reports, and the files that they are written to."""

    def __init__(self, output: Path, work: Path, dry: bool, seconds: float) -> None:
        self.output, self.work, self.dry = output, work, dry
        self.end = time.monotonic() + seconds
        self.reports: dict[str, dict[str, Any]] = {}
        self.about = {**describe(), "dry_run": dry}

    def keep(self) -> None:
        """Take over the sections of the ``gpu.json`` that is there, each with the commit that it was measured at."""
        path = self.output / "gpu.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        if found.get("dry_run") == self.dry:
            self.reports |= found["sections"]
            if "ceilings" in self.reports:
                (self.work / "ceilings.json").write_text(json.dumps(self.reports["ceilings"]))

    def run(self, name: str) -> None:
        """One section in its own process, killed with all that it started once its time is over."""
        planned = DRY_SECONDS if self.dry else SECTIONS[name].seconds
        seconds = min(planned, self.end - time.monotonic())
        if seconds < min(planned, 10.0):
            self.reports[name] = {"status": "left out, no time left"}
            self.write()
            return
        path, log = self.work / f"{name}.json", self.work / f"{name}.log"
        path.unlink(missing_ok=True)
        began, seen = time.monotonic(), 0
        with log.open("w") as out:
            process = subprocess.Popen(
                command_of(name, "--folder", self.work, "--seconds", seconds),
                cwd=ROOT, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
            try:
                while process.poll() is None and time.monotonic() - began < seconds + GRACE:
                    time.sleep(POLL)
                    changed = path.stat().st_mtime_ns if path.exists() else 0
                    if changed != seen:
                        seen = changed
                        self.take(name, "running")
            finally:
                status = process.poll()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # also what a section that ended left behind
                process.wait()
        ends = {None: f"killed after {time.monotonic() - began:.0f} s", 0: "finished"}
        self.take(name, ends.get(status, f"ended with status {status}"))
        with (self.output / "gpu.log").open("a") as every:
            every.write(f"== {name} ==\n{log.read_text(errors='replace')}\n")

    def take(self, name: str, status: str) -> None:
        """A section's report as it stands, into ``gpu.json``."""
        path = self.work / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        self.reports[name] = {"status": status, "time": self.about["time"], "commit": self.about["commit"], **found}
        self.write()

    def write(self) -> None:
        ordered = {name: self.reports[name] for name in SECTIONS if name in self.reports}
        for name, report in ordered.items():
            report["marks"] = marks(name, ordered)
        write_aside(self.output / "gpu.json", strict_json({**self.about, "sections": ordered}, indent=1) + "\n")
        captured = io.StringIO()
        with contextlib.redirect_stdout(captured):
            show(self.about, ordered)
        write_aside(self.output / "gpu.txt", captured.getvalue())


def command_of(name: str, *arguments: Any) -> list[str]:
    """The command of a section's process."""
    return [sys.executable, "-m", "benchmarks.gpu.section", name, *map(str, arguments)]


def marks(name: str, reports: dict[str, Any]) -> list[str]:
    """Why a section's figures may be those of something wrong: its failed checks, and failed tests that cover it."""
    own = [f"{check}: {why}" for check, why in reports[name].get("failed_checks", {}).items()]
    failed = reports.get("tests", {}).get("result", {}).get("failed", [])
    return own + [f"test failed: {file} {test}" for file, test in failed if covers(name, file, test)]


def covers(name: str, file: str, test: str) -> bool:
    """Whether the failure of a test marks the figures of a section."""
    watched = SECTIONS[name].tests
    return file in watched and (test == "crashed" or re.search(watched[file], test) is not None)


def wrong(reports: dict[str, Any], chosen: list[str]) -> list[str]:
    """One line for each section that failed, did not end, or is marked."""
    lines = []
    for name in chosen:
        report = reports[name]
        if report["status"] != "finished":
            lines.append(f"{name}: {report['status']}")
        lines += [f"{name}, {one}: {why.strip().splitlines()[-1]}" for one, why in report.get("failed", {}).items()]
        lines += [f"{name}, marked: {why}" for why in report["marks"]]
    lines += [
        f"test failed: {file} {test}" for file, test in reports.get("tests", {}).get("result", {}).get("failed", [])
    ]
    return lines


def rehearse() -> None:
    """Start this program again with the interpreter in place of a device; Triton reads that when it is imported."""
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
    os.execve(sys.executable, command, os.environ | INTERPRETED)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on CPU, untimed")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="these sections; others are kept")
    parser.add_argument("--output", type=Path, help="folder of gpu.json, gpu.txt and gpu.log; benchmarks/results"
                        " without it, and for a dry run a temporary one")  # fmt: skip
    parser.add_argument("--seconds", type=float, help=f"for everything; {SECONDS:.0f} without it")
    arguments = parser.parse_args()
    if arguments.dry_run and not DRY:
        rehearse()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("No CUDA device here: the GPU tests and benchmarks need one.", file=sys.stderr)
        raise SystemExit(2)
    begun = time.monotonic()
    seconds = arguments.seconds or (DRY_SECONDS * len(SECTIONS) if arguments.dry_run else SECONDS)
    with tempfile.TemporaryDirectory() as work:
        output = arguments.output or (Path(work) / "output" if arguments.dry_run else RESULTS)
        output.mkdir(parents=True, exist_ok=True)
        (output / "gpu.log").unlink(missing_ok=True)
        suite = Suite(output, Path(work), arguments.dry_run, seconds)
        if arguments.only:
            suite.keep()
        chosen = [name for name in SECTIONS if name in (arguments.only or SECTIONS)]
        for name in chosen:
            suite.run(name)
            took = suite.reports[name].get("seconds")
            spent = "" if took is None else f" in {took:.0f} s"
            print(f"{name}: {suite.reports[name]['status']}{spent}", flush=True)
        print((output / "gpu.txt").read_text())
        lines = wrong(suite.reports, chosen)
        if lines:
            print((output / "gpu.log").read_text()[-20000:], file=sys.stderr)
        print(f"{time.monotonic() - begun:.0f} s; {', '.join(chosen)}; written to {output}")
        for name in chosen:
            for one in suite.reports[name].get("left_out", []):
                print(f"skipped, out of time: {name}: {one}")
        for line in lines:
            print(line, file=sys.stderr)
    if lines:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
