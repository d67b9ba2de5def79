"""The GPU suite's results as tables."""

import importlib
import traceback
from typing import Any

from benchmarks.gpu.section import SECTIONS


def show(about: dict[str, Any], reports: dict[str, Any]) -> None:
    """What was measured, section by section, each with what marks it."""
    machine, versions = about["machine"], about["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    kind = "A dry run, on CPU: no figure means anything" if about["dry_run"] else machine.get("gpu", "no GPU")
    print(f"{kind}\n{about['time']}, commit {about['commit']}\n{named}\n")
    ceilings = reports.get("ceilings", {}).get("result", {})
    for name, report in reports.items():
        if report["status"] != "finished":
            print(f"{name}: {report['status']}")
        for one, why in report.get("failed", {}).items():
            print(f"failed: {name}, {one}: {why.strip().splitlines()[-1]}")
        if report.get("marks"):
            print(f"MARKED, the figures of {name} may be those of a wrong result:")
            print(*(f"  {mark}" for mark in report["marks"]), sep="\n")
        if report.get("result"):
            show_section(name, report["result"], ceilings)


def show_section(name: str, result: dict[str, Any], ceilings: dict[str, float]) -> None:
    """One section's tables. A result that is not whole yet shows what it can."""
    module, function = SECTIONS[name].function.split(".")
    found = importlib.import_module(f"benchmarks.gpu.{module}")
    print_result = getattr(found, f"show_{function.removeprefix('bench_')}", None) or found.show
    try:
        print_result(result, ceilings)
    except (KeyError, IndexError, TypeError):
        print(f"{name}: not whole yet, {traceback.format_exc().strip().splitlines()[-1]}")
    print()
