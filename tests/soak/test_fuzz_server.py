"""The server under fire, at length (``tests/test_benchmark_commands.py`` runs a slice)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_five_thousand_random_requests_break_nothing(tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    environment = {**os.environ, "TOOLKIT_BENCHMARK_RESULTS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.fuzz", "--requests", "5000", "--max-p99", "0.1"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
