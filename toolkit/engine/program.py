"""A decode step as a flat program: the model's forward, recorded once as a list of ops, replayed without the model.

The Python of a stock forward (module calls, decorators, keyword handling) costs a large part of a small model's decode
step. A recording holds the ops alone, around the parameters themselves: they are only ever updated in place, so a
program outlives training steps. What a replay computes is what the forward computes, op by op, bit for bit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Recorder(TorchDispatchMode):
    """Writes down every op that reaches the dispatcher, naming tensors by identity."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.names = {id(tensor): f"i{n}" for n, tensor in enumerate(inputs)}
        self.alive: list[Any] = list(inputs)  # an identity must not be given out twice during the recording
        self.bound: dict[str, Any] = {}
        self.lines: list[tuple[str, str, list[str]]] = []  # result, call, names of the tensors it reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read: list[str] = []
        passed = [self.render(value, read) for value in args]
        passed += [f"{key}={self.render(value, read)}" for key, value in kwargs.items()]
        result = func(*args, **kwargs)
        self.lines.append((self.assign(result), f"{self.bind(func, 'f')}({', '.join(passed)})", read))
        return result

    def bind(self, value: Any, prefix: str) -> str:
        for name, known in self.bound.items():
            if known is value:
                return name
        name = f"{prefix}{len(self.bound)}"
        self.bound[name] = value
        return name

    def render(self, value: Any, read: list[str]) -> str:
        """The source text that stands for an argument."""
        if isinstance(value, Tensor):
            name = self.names.get(id(value))
            if name is None:  # a parameter, a buffer or a constant made outside the recording
                name = self.names[id(value)] = self.bind(value, "c")
                self.alive.append(value)
            read.append(name)
            return name
        if isinstance(value, (list, tuple)):
            inner = ", ".join(self.render(item, read) for item in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        return self.bind(value, "c")

    def assign(self, result: Any) -> str:
        """Names for the result's tensors, as an assignment target."""
        self.alive.append(result)
        if isinstance(result, Tensor):
            name = self.names[id(result)] = f"t{len(self.alive)}"
            return name
        if isinstance(result, (list, tuple)):
            return "(" + "".join(f"{self.assign(item)}, " for item in result) + ")" if result else "_"
        return "_"


def record(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    """``function`` as straight-line code over torch ops, for inputs of the same shapes as ``inputs``.

    The function runs once. Control flow and Python numbers are those of this run; tensors that are not inputs
    (parameters, buffers) are held by reference. Ops that write their arguments are kept, in order.
    """
    recorder = _Recorder(inputs)
    with torch.no_grad(), recorder:
        output = function(*inputs)
    return _compile(recorder, recorder.names[id(output)], len(inputs))


def _compile(recorder: _Recorder, output: str, count: int) -> Callable[..., Tensor]:
    """Python source with every op and constant as a local default: no attribute look-ups when it runs."""
    lines: list[str] = []
    seen = {output, *recorder.bound, *(f"i{n}" for n in range(count))}
    for target, call, read in reversed(recorder.lines):
        dead = sorted({name for name in read if name not in seen})
        seen.update(dead)
        if dead:  # activations go back to the allocator when eager execution would let them go
            lines.append(f"    del {', '.join(dead)}")
        lines.append(f"    {target} = {call}")
    arguments = ", ".join([*(f"i{n}" for n in range(count)), *(f"{name}={name}" for name in recorder.bound)])
    source = "\n".join([f"def program({arguments}):", *reversed(lines), f"    return {output}"])
    namespace = dict(recorder.bound)
    exec(compile(source, "<recorded forward>", "exec"), namespace)
    return namespace["program"]
