"""A list of kernels and where their arguments lie, run by the native library as one call (``cpu.cpp``)."""

from collections.abc import Sequence
from typing import Any

import torch

from toolkit.ops import native


def new_program(inputs: Sequence[int], output: int, registers: int) -> Any | None:
    """An empty program of the native library; None where the library, or this class of it, is not there.

    Values of a run are registers, numbered from 0. Nodes are added in order: ``add_node(name, overload)``, then each
    argument of the op's schema (``add_register``, ``add_constant``, ``add_default``, ``add_tensors``), each return
    (``add_result``), then ``end_node``. ``run(inputs)`` calls the kernels below autograd and returns the output.

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
