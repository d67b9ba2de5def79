"""Long comparisons whose results are committed: ``make soak`` makes them again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| ([\w-]+) \| (covered|unsupported|wrong) \|.*\|$", re.MULTILINE)


def run(*command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = [sys.executable, "-m", *command]
    result = subprocess.run(done, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_coverage_page_is_what_coverage_measures(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    run("toolkit.cli", "coverage", "--write", str(page))
    assert dict(ROW.findall(page.read_text())) == dict(ROW.findall((ROOT / "docs" / "coverage.md").read_text()))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["distributed", "trainer_curve", "long_sequence"])
def test_a_long_comparison_passes_its_gate(name: str) -> None:
    """200 steps under each framework, 200 steps of a Trainer, a sequence of 32,768 tokens."""
    run(f"benchmarks.{name}")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_kernel_table_is_made_anew() -> None:
    pytest.importorskip("triton")
    run("tools.compile_kernels")
