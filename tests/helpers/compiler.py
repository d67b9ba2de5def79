"""Kernels compiled ahead of time for a target, from a session whose own Triton is the interpreter."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

from benchmarks import kernels


class Compiler:
    """A process in which Triton compiles. Triton decides between compiler and interpreter when it is imported."""

    def __init__(self, cache: str) -> None:
        self.cache = cache
        self.pool: ProcessPoolExecutor | None = None

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` in that process; both must pickle, and so must the result."""
        if self.pool is None:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(1, context, initializer=_start, initargs=(self.cache,))
            with _without_interpreter():
                return self.pool.submit(function, *args).result()
        return self.pool.submit(function, *args).result()

    def compile(self, module: str, case: str, arch: str) -> tuple[list[kernels.Compiled], list[str]]:
        """The kernels that ``case`` of a module of ``benchmarks`` launches, compiled for ``arch``, and their PTX."""
        compiled, assembly = self.run(compile_case, module, case, arch)
        return compiled, assembly

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()


@contextmanager
def _without_interpreter() -> Iterator[None]:
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        yield


def _start(cache: str) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["TRITON_CACHE_DIR"] = cache


def compile_case(module: str, case: str, arch: str) -> tuple[list[kernels.Compiled], list[str]]:
    import importlib

    import triton

    assembly: list[str] = []
    compile = triton.compile

    def recorded(*args: Any, **options: Any) -> Any:
        made = compile(*args, **options)
        assembly.append(made.asm.get("ptx", ""))
        return made

    call = importlib.import_module(f"benchmarks.{module}").cases()[case]
    with mock.patch.object(triton, "compile", recorded):
        return kernels.compile_case(call, arch), assembly
