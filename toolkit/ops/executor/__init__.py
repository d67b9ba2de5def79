"""A list of kernels and where their arguments lie, run by the native library as one call (``cpu.cpp``)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from toolkit.ops import native


def new_program(inputs: Sequence[int], output: int, registers: int) -> Any | None:
    """An empty program of the native library; None where the library, or this class of it, is not there.

    Values of a run are registers, numbered from 0. Nodes are added in order: ``add_node(name, overload)``, then each
    argument of the op's schema (``add_register``, ``add_constant``, ``add_default``, ``add_tensors``), each return
    (``add_result``), then ``end_node``. ``run(inputs, own_threads)`` calls the kernels below autograd and returns the
    output; with ``own_threads`` they share out work as in ``step_threads``.

    Args:
        inputs: the register that each input is put into.
        output: the register that a run returns.
        registers: how many there are.
    """
    if native.load() is None:
        return None
    try:
        program = torch.classes.toolkit_native.Program
    except RuntimeError:  # a library built from older sources
        return None
    return program(list(inputs), output, registers)


@contextmanager
def step_threads() -> Iterator[None]:
    """Native kernels called here share out work to threads that wait for the next one, and not to OpenMP's.

    OpenMP's wait by spinning, and two sets of threads that wait for work take each other's cores: what runs between two
    steps of own threads has to use them too. Nothing where the native library is missing.
    """
    try:
        held = torch.classes.toolkit_native.StepThreads() if native.load() is not None else None
    except RuntimeError:
        held = None
    try:
        yield
    finally:
        del held
