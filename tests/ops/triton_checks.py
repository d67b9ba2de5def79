"""What the tests of Triton kernels without a GPU share: a run in the interpreter, and what may be shipped."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tools.compile_kernels import compiler

HERE = Path(__file__).parent


def run_interpreted(*names: str) -> None:
    """The tests of ``interpreted_<name>.py`` in one process of their own: triton reads TRITON_INTERPRET once."""
    command = [sys.executable, "-m", "pytest", *(str(HERE / f"interpreted_{name}.py") for name in names)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TOOLKIT_NATIVE": "off", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " passed" in finished.stdout


def compile_fit(case: Callable[[], None], arch: str) -> list[compiler.Compiled]:
    """The kernels that ``case`` launches, compiled for ``arch``; no one has a fault."""
    compiled = compiler.compile_case(case, arch)
    assert compiled
    for made in compiled:
        assert compiler.faults(made) == [], made
    return compiled
