"""A decode step as a captured graph: the ops of the model's forward, captured once and replayed without the model.

The Python of a stock forward (module calls, decorators, keyword handling) costs a large part of a small model's decode
step. A captured graph holds the ops alone and refers to the parameters themselves. Parameters are only ever updated in
place, so a graph outlives training steps. A replay runs the same ops in the same order as the forward, so its results
are bitwise identical.

A forward whose Python depends on the values of its tensors (a loop over the experts that some token is routed to, say)
cannot be replayed: another step would take another path. ``CapturedGraph.data_dependent_op`` names the op that does so.
One that reads a parameter on the host (``scale.item()``) can be, until the parameter is written:
``CapturedGraph.reads_constants``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Ways to the host that the dispatcher does not see.
_HOST_READS = {
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.item,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__index__,
}
_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
PLAIN_TENSORS = {Tensor, torch.nn.Parameter}
"""Types whose ops are those of their memory: other subclasses may do anything in their ``__torch_dispatch__``."""
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


@dataclass(eq=False, slots=True)
class Value:
    """One tensor of a graph.

    Args:
        tensor: what it was when the graph was captured; a constant is held by reference.
        kind: "input", "constant" (a parameter, a buffer or another tensor made before) or "result" of a node.
    """

    tensor: Tensor
    kind: str = "result"


Argument = Any
"""A ``Value``, a Python value, or a list or tuple of arguments."""
Result = Any
"""A ``Value``, None (what is not a tensor), or a list of results."""


@dataclass(eq=False, slots=True)
class Node:
    """One call of an op.

    Args:
        op: a torch op overload.
        args: its positional arguments.
        kwargs: its keyword arguments.
        result: what it returns.
    """

    op: OpOverload
    args: tuple[Argument, ...]
    kwargs: dict[str, Argument]
    result: Result = None

    @property
    def reads(self) -> list[Value]:
        """The tensors among the arguments, in order."""
        return [*values_in(self.args), *values_in(tuple(self.kwargs.values()))]

    @property
    def results(self) -> list[Value]:
        """The tensors that the call returns, in order."""
        return list(values_in(self.result))

    @property
    def writes(self) -> bool:
        """Whether the op writes any of its arguments."""
        return bool(self.op._schema.is_mutable)


@dataclass
class CapturedGraph:
    """The nodes of one run of a function, in order.

    Args:
        inputs: the tensors that a replay is given.
        nodes: calls of ops.
        output: the tensor that a replay returns.
        data_dependent_op: an op by which input values decided what was run; "" where there was none.
        reads_constants: whether values of constants decided it.
        idle_inputs: for each input a number to fill it with (None: as it is), so that a run writes no state; None where
            that is not known.
    """

    inputs: list[Value]
    output: Value
    nodes: list[Node] = field(default_factory=list)
    data_dependent_op: str = ""
    reads_constants: bool = False
    idle_inputs: Sequence[int | None] | None = None

    @property
    def values(self) -> list[Value]:
        """Every value that it is given, reads, makes or returns; several times where it stands in several places."""
        of_nodes = (value for node in self.nodes for value in (*node.reads, *node.results))
        return [*self.inputs, *of_nodes, self.output]

    def replace(self, others: dict[Value, Value]) -> None:
        """Let every reader of a key of ``others`` read its value instead."""

        def follow(value: Value) -> Value:
            while value in others:
                value = others[value]
            return value

        for node in self.nodes if others else ():
            if any(value in others for value in node.reads):
                node.args = mapped(node.args, follow)
                node.kwargs = {name: mapped(argument, follow) for name, argument in node.kwargs.items()}
        self.output = follow(self.output)

    def compile(self) -> Callable[..., Tensor]:
        """The graph as a function of its inputs: straight-line code, one call per node.

        Ops and constants are bound as defaults of parameters, so that nothing is looked up by name when it runs.
        """
        names: dict[int, str] = {id(value): f"i{at}" for at, value in enumerate(self.inputs)}
        bound: dict[str, Any] = {}

        def constant(value: Any) -> str:
            if id(value) not in names:
                names[id(value)] = f"c{len(bound)}"
                bound[names[id(value)]] = value.tensor if isinstance(value, Value) else value
            return names[id(value)]

        def expression(argument: Argument) -> str:
            if isinstance(argument, Value):
                return constant(argument) if argument.kind == "constant" else names[id(argument)]
            if isinstance(argument, list):
                return f"[{', '.join(map(expression, argument))}]"
            if isinstance(argument, tuple):
                return f"({''.join(f'{expression(item)}, ' for item in argument)})"
            if argument is None or isinstance(argument, (bool, int, str)):
                return repr(argument)
            return constant(argument)

        def target(result: Result) -> str:
            if isinstance(result, list) and result:
                return f"({''.join(f'{target(item)}, ' for item in result)})"
            if not isinstance(result, Value):
                return "_"
            return names.setdefault(id(result), f"t{len(names)}")

        dying = self.last_reads()
        lines = []
        for node in self.nodes:
            arguments = [expression(argument) for argument in node.args]
            arguments += [f"{name}={expression(argument)}" for name, argument in node.kwargs.items()]
            lines.append(f"{target(node.result)} = {constant(node.op)}({', '.join(arguments)})")
            if node in dying:  # memory goes back to the allocator when eager execution would let it go
                lines.append(f"del {', '.join(names[id(value)] for value in dying[node])}")
        lines.append(f"return {expression(self.output)}")
        parameters = [*(names[id(value)] for value in self.inputs), *(f"{name}={name}" for name in bound)]
        source = "\n    ".join([f"def replay({', '.join(parameters)}):", *lines])
        exec(compile(source, "<captured graph>", "exec"), bound)
        replay: Callable[..., Tensor] = bound["replay"]
        return replay

    def last_reads(self) -> dict[Node, list[Value]]:
        """Of each node, the results of others that no later node reads."""
        found: dict[Node, list[Value]] = {}
        seen = {self.output}
        for node in reversed(self.nodes):
            last = [value for value in dict.fromkeys(node.reads) if value.kind == "result" and value not in seen]
            seen.update(last)
            if last:
                found[node] = last
        return found


def values_in(argument: Argument | Result) -> Iterator[Value]:
    """The values in an argument or a result, in order."""
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from values_in(item)


def mapped(argument: Argument, function: Callable[[Value], Any]) -> Argument:
    """``argument`` with ``function`` of each of its values in the place of the value."""
    if isinstance(argument, Value):
        return function(argument)
    if isinstance(argument, (list, tuple)):
        return type(argument)(mapped(item, function) for item in argument)
    return argument


class _Capture(TorchDispatchMode):
    """Adds every op that reaches the dispatcher to ``nodes``. Tensors are recognised by identity."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        TorchDispatchMode.__init__(self)  # not by super(): torch leaves it without types
        self.nodes: list[Node] = []
        self.data_dependent_op = ""
        self.reads_constants = False
        self._values: dict[int, Value] = {}  # by id of the tensor, which the value keeps alive
        self.inputs = [self.value(tensor, "input") for tensor in inputs]
        self._varying = set(self.inputs)  # what depends on the inputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        node = Node(func, self.argument(tuple(args)), {name: self.argument(value) for name, value in kwargs.items()})
        result = func(*args, **kwargs)
        node.result = self.result(result)
        self.nodes.append(node)
        reads = node.reads
        if not self._varying.isdisjoint(reads):
            self._varying.update(node.results)
            if node.writes:
                self._varying.update(reads)
            if is_data_dependent(func, args):
                self.data_dependent_op = self.data_dependent_op or str(func)
        elif is_data_dependent(func, args):
            self.reads_constants = True
        return result

    def host_read(self, tensor: Any, name: str) -> None:
        """Python reads a tensor's values."""
        if isinstance(tensor, Tensor) and self._values.get(id(tensor)) in self._varying:
            self.data_dependent_op = self.data_dependent_op or name
        elif isinstance(tensor, Tensor):
            self.reads_constants = True

    def value(self, tensor: Tensor, kind: str = "result") -> Value:
        """A new value for ``tensor``."""
        self._values[id(tensor)] = value = Value(tensor, kind)
        return value

    def argument(self, argument: Any) -> Argument:
        """``argument`` with values in the place of tensors."""
        if isinstance(argument, Tensor):
            return self._values.get(id(argument)) or self.value(argument, "constant")
        if isinstance(argument, (list, tuple)):
            return (list if isinstance(argument, list) else tuple)(self.argument(item) for item in argument)
        return argument

    def result(self, result: Any) -> Result:
        """What an op returned, with values in the place of tensors."""
        if isinstance(result, Tensor):
            return self.value(result)
        return [self.result(item) for item in result] if isinstance(result, (list, tuple)) else None

    def value_of(self, tensor: Tensor) -> Value:
        """The value that ``tensor`` has."""
        return self._values[id(tensor)]


def is_data_dependent(op: OpOverload, args: Any) -> bool:
    """Whether a result, or its shape, is computed on the host from the values of the arguments."""
    if op in _INDEXED:  # only by a mask
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool(_DATA_DEPENDENT.intersection(op.tags))


class _HostReads(TorchFunctionMode):
    """Reports the calls of ``_HOST_READS``."""

    def __init__(self, capture: _Capture) -> None:
        super().__init__()
        self.capture = capture

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HOST_READS:
            self.capture.host_read(args[0], func.__name__)
        return func(*args, **(kwargs or {}))


def capture(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> CapturedGraph:
    """``function`` as a graph of torch ops, for inputs of the same shapes as ``inputs``.

    The function runs once. Control flow and Python numbers are those of this run (see ``data_dependent_op``). Tensors
    that are not inputs (parameters, buffers) are held by reference. Ops that write their arguments are kept, in order.
    """
    mode = _Capture(inputs)
    with torch.no_grad(), mode, _HostReads(mode):
        output = function(*inputs)
    return CapturedGraph(mode.inputs, mode.value_of(output), mode.nodes, mode.data_dependent_op, mode.reads_constants)
