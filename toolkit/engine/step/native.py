"""Runs a captured graph as one call of the native library, without Python between its ops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from toolkit.engine.step.graph import PLAIN_TENSORS, Argument, CapturedGraph, Node, Result, Value
from toolkit.ops.executor import new_program


def native_replay(graph: CapturedGraph) -> Callable[..., Tensor] | None:
    """``graph`` as a function of its inputs; None where the native library is missing or an argument is unknown to it.

    Tensors that are not inputs are held by reference, as ``CapturedGraph.compile`` holds them. Ops are called with the
    CPU's own kernels, below autograd; an op whose kernel is Python takes the interpreter's lock for that op only.
    """
    if not _on_cpu(graph):
        return None
    numbers = {value: at for at, value in enumerate(dict.fromkeys(_registers(graph)))}
    program = new_program([numbers[value] for value in graph.inputs], numbers.get(graph.output, -1), len(numbers))
    if program is None or graph.output not in numbers:
        return None
    dying = graph.last_reads()
    try:
        for node in graph.nodes:
            _add(program, node, numbers, dying.get(node, []))
    except (RuntimeError, TypeError):  # a value that the library has no word for: a generator, say
        return None
    return NativeReplay(program.run, _has_own_threads(graph))


class NativeReplay:
    """A program of the native library.

    Attributes:
        own_threads: whether its kernels share out work as in ``step_threads``.
    """

    def __init__(self, run: Any, own_threads: bool) -> None:
        self._run = run
        self.own_threads = own_threads

    def __call__(self, *inputs: Tensor) -> Tensor:
        result: Tensor = self._run(inputs, self.own_threads)
        return result


def _has_own_threads(graph: CapturedGraph) -> bool:
    """Whether next to nothing of a graph runs on OpenMP's threads, which spin for a while after each op of theirs."""
    return sum(map(_runs_on_openmp, graph.nodes)) <= 1


def _runs_on_openmp(node: Node) -> bool:
    """Whether torch shares the op out to threads: its own op, no view, of a large result, or ours that calls it."""
    schema = node.op._schema
    namespace, _, name = schema.name.partition("::")
    if namespace == "toolkit":
        return name in _OURS_OF_PRODUCTS
    if any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns):
        return False
    computed = [value for value in (*node.reads, *node.results) if value.kind != "constant"]
    return name in _PRODUCTS or any(value.tensor.numel() >= _GRAIN for value in computed)


_OURS_OF_PRODUCTS = {"joined_linear"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "einsum", "convolution"}
_GRAIN = 32768  # elements from which torch wakes threads (at::internal::GRAIN_SIZE)


def _on_cpu(graph: CapturedGraph) -> bool:
    return all(one.tensor.device.type == "cpu" and type(one.tensor) in PLAIN_TENSORS for one in graph.values)


def _registers(graph: CapturedGraph) -> list[Value]:
    return [*graph.inputs, *(value for node in graph.nodes for value in node.results)]


def _add(program: Any, node: Node, numbers: dict[Value, int], dying: list[Value]) -> None:
    program.add_node(node.op._schema.name, node.op._schema.overload_name)
    for at, argument in enumerate(node.op._schema.arguments):
        if at < len(node.args) and not argument.kwarg_only:
            _add_argument(program, node.args[at], numbers)
        elif argument.name in node.kwargs:
            _add_argument(program, node.kwargs[argument.name], numbers)
        else:
            program.add_default()
    returns = node.op._schema.returns
    results = node.result if len(returns) > 1 and isinstance(node.result, list) else [node.result]
    for result in results if returns else []:
        program.add_result(_numbers_of(result, numbers), isinstance(result, list))
    program.end_node([numbers[value] for value in dying])


def _numbers_of(result: Result, numbers: dict[Value, int]) -> list[int]:
    items = result if isinstance(result, list) else [result]
    return [numbers[item] if isinstance(item, Value) else -1 for item in items]


def _add_argument(program: Any, argument: Argument, numbers: dict[Value, int]) -> None:
    if isinstance(argument, Value):
        if argument in numbers:
            program.add_register(numbers[argument])
        else:
            program.add_constant(argument.tensor)
    elif isinstance(argument, (list, tuple)) and all(isinstance(item, int) for item in argument):
        program.add_ints(list(argument))  # an empty list says nothing of its type
    elif isinstance(argument, (list, tuple)) and all(item is None or isinstance(item, Value) for item in argument):
        registers = [numbers.get(item, -1) if isinstance(item, Value) else -1 for item in argument]
        constants = [
            item.tensor if isinstance(item, Value) and register < 0 else None
            for item, register in zip(argument, registers)
        ]
        program.add_tensors(registers, constants)
    elif isinstance(argument, (torch.dtype, torch.layout, torch.memory_format)):
        program.add_int(argument)
    else:
        program.add_constant(list(argument) if isinstance(argument, tuple) else argument)
