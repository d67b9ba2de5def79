"""Kernels compiled ahead of time for a target, from a session whose own Triton is the interpreter."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

from tools.compile_kernels import budgets, compiler, table


class Compiler:
    """A process in which Triton compiles: Triton decides between compiler and interpreter when it is imported."""

    def __init__(self, cache: str) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}):
            os.environ.pop("TRITON_INTERPRET", None)
            self.pool.submit(os.getpid).result()  # started with this environment

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` in that process. The function is found there by its module and name."""
        return self.pool.submit(function, *args).result()

    def compile(self, case: str, arch: str) -> tuple[list[compiler.Compiled], list[str]]:
        """What the kernels of a case compile to for ``arch``, none with a fault or over its budget, and their PTX."""
        compiled, assembly = self.run(compile_case, case, arch)
        assert compiled
        for made in compiled:
            assert compiler.faults(made) == [], made
        assert budgets.over([(case, made) for made in compiled], budgets.read()) == []
        return compiled, assembly


def compile_case(case: str, arch: str) -> tuple[list[compiler.Compiled], list[str]]:
    import triton

    assembly: list[str] = []
    compile = triton.compile

    def recorded(*args: Any, **options: Any) -> Any:
        made = compile(*args, **options)
        assembly.append(made.asm.get("ptx", ""))
        return made

    with mock.patch.object(triton, "compile", recorded):
        return compiler.compile_case(table.cases()[case], arch), assembly
