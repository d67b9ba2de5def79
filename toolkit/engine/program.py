"""A decode step as a flat program: the model's forward, recorded once as a list of ops, replayed without the model.

The Python of a stock forward (module calls, decorators, keyword handling) costs a large part of a small model's decode
step. A recording holds the ops alone, around the parameters themselves: they are only ever updated in place, so a
program outlives training steps. What a replay computes is what the forward computes, op by op, bit for bit.

A forward whose Python depends on what its tensors hold (a loop over the experts that some token goes to, say) has no
such program: another step would take another path. The recording says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Ways to the host that the dispatcher does not see.
_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__index__}
_SHAPED = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


@dataclass
class Call:
    """One op of a program: what it is called with, as source text, and the names that its results get.

    arguments: names of tensors and constants, or literals. reads: the names of tensors among them.
    results: a name for a tensor, a list of them for several, None for nothing.
    """

    op: Any
    arguments: list[str]
    reads: list[str]
    results: str | list[str] | None

    def names(self) -> list[str]:
        """Names of all results."""
        return self.results if isinstance(self.results, list) else [self.results] if self.results else []


@dataclass
class Recording:
    """The calls of one run in order; ``constants`` are what they hold by reference, ``tensors`` what each name was.

    decided_by: an op by which the values of the inputs decided what was run; "" where there was none.
    """

    calls: list[Call] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    output: str = ""
    decided_by: str = ""

    def constant(self, value: Any, prefix: str = "c") -> str:
        """The name of a value that is no tensor of the program: one name a value."""
        for name, known in self.constants.items():
            if known is value:
                return name
        name = f"{prefix}{len(self.constants)}"
        self.constants[name] = value
        return name


class _Recorder(TorchDispatchMode):
    """Writes down every op that reaches the dispatcher, naming tensors by identity."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.recording = Recording(inputs=[f"i{n}" for n in range(len(inputs))])
        self.names: dict[int, str] = {}
        self.alive: list[Any] = []  # an identity must not be given out twice during the recording
        self.varying: set[str] = set(self.recording.inputs)  # names of what depends on the inputs
        for name, tensor in zip(self.recording.inputs, inputs):
            self.name(tensor, name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads: list[str] = []
        passed = [self.render(value, reads) for value in args]
        passed += [f"{key}={self.render(value, reads)}" for key, value in kwargs.items()]
        result = func(*args, **kwargs)
        call = Call(func, passed, reads, self.assign(result))
        self.recording.calls.append(call)
        if self.varying.intersection(reads):
            self.varying.update(_flat(call.results))
            if func._schema.is_mutable:
                self.varying.update(reads)
            if _looks_at_values(func, args):
                self.recording.decided_by = self.recording.decided_by or str(func)
        return result

    def read(self, tensor: Any, by: str) -> None:
        """Python looks at a tensor's values."""
        if isinstance(tensor, Tensor) and self.names.get(id(tensor)) in self.varying:
            self.recording.decided_by = self.recording.decided_by or by

    def name(self, tensor: Tensor, name: str) -> str:
        self.alive.append(tensor)
        self.names[id(tensor)] = name
        self.recording.tensors[name] = tensor
        return name

    def render(self, value: Any, reads: list[str]) -> str:
        """The source text that stands for an argument."""
        if isinstance(value, Tensor):
            name = self.names.get(id(value))
            if name is None:  # a parameter, a buffer or a constant made outside the recording
                name = self.name(value, self.recording.constant(value))
            reads.append(name)
            return name
        if isinstance(value, (list, tuple)):
            inner = ", ".join(self.render(item, reads) for item in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        return self.recording.constant(value)

    def assign(self, result: Any) -> Any:
        """Names for the result's tensors."""
        if isinstance(result, Tensor):
            return self.name(result, f"t{len(self.alive)}")
        self.alive.append(result)
        return [self.assign(item) for item in result] if isinstance(result, (list, tuple)) else None


def _flat(results: Any) -> list[str]:
    """All names among the results of a call."""
    if isinstance(results, list):
        return [name for result in results for name in _flat(result)]
    return [results] if results else []


def _looks_at_values(op: Any, args: Any) -> bool:
    """Whether a result, or its shape, is made on the host from what the arguments hold."""
    if op in _INDEXED:  # only by a mask
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool(_SHAPED.intersection(op.tags))


class _Reads(TorchFunctionMode):
    """Notices the reads of ``_READS``."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            self.recorder.read(args[0], func.__name__)
        return func(*args, **(kwargs or {}))


def record(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Recording:
    """``function`` as calls of torch ops, for inputs of the same shapes as ``inputs``.

    The function runs once. Control flow and Python numbers are those of this run (see ``decided_by``); tensors that are
    not inputs (parameters, buffers) are held by reference. Ops that write their arguments are kept, in order.
    """
    recorder = _Recorder(inputs)
    with torch.no_grad(), recorder, _Reads(recorder):
        output = function(*inputs)
    recorder.recording.output = recorder.names[id(output)]
    return recorder.recording


def build(recording: Recording) -> Callable[..., Tensor]:
    """The recording as a function: every op and constant is a local default, nothing is looked up when it runs."""
    lines: list[str] = []
    last = {recording.output, *recording.constants, *recording.inputs}
    for call in reversed(recording.calls):
        dead = sorted({name for name in call.reads if name not in last})
        last.update(dead)
        if dead:  # activations go back to the allocator when eager execution would let them go
            lines.append(f"    del {', '.join(dead)}")
        op = recording.constant(call.op, "f")
        names = call.names()
        target = f"({', '.join(names)},)" if isinstance(call.results, list) and names else names[0] if names else "_"
        lines.append(f"    {target} = {op}({', '.join(call.arguments)})")
    arguments = ", ".join([*recording.inputs, *(f"{name}={name}" for name in recording.constants)])
    source = "\n".join([f"def program({arguments}):", *reversed(lines), f"    return {recording.output}"])
    namespace = dict(recording.constants)
    exec(compile(source, "<recorded forward>", "exec"), namespace)
    return namespace["program"]
