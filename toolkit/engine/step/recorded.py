"""Runs a captured graph from fixed addresses, on a CPU, as a CUDA graph runs one on a device.

Everything that a step reads or writes has its memory from recording on: constants and inputs where they lay then,
results in memory that it writes again. Nothing is looked up when it runs, so a parameter
that has other memory since is not followed. Whoever replays asks ``addresses_hold`` first.

It is for tests, where it stands for a device: what it finds stale becomes a difference, not a speed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toolkit.engine.step.graph import PLAIN_TENSORS, Argument, CapturedGraph, Node, Value, is_data_dependent, mapped
from toolkit.errors import ToolkitError


def recorded_replay(graph: CapturedGraph) -> "RecordedReplay | None":
    """``graph`` with fixed addresses; None where it holds a tensor that is not plain memory of the CPU.

    Raises:
        ToolkitError: where values were read on the host, which a replay could not do again.
    """
    if graph.data_dependent_op:
        raise _unreplayable(graph.data_dependent_op)
    for node in graph.nodes:  # what a constant decided is fixed too, unless its op is still there
        if is_data_dependent(node.op, mapped(node.args, lambda value: value.tensor)):
            raise _unreplayable(str(node.op))
    if not all(type(one.tensor) in PLAIN_TENSORS and _is_strided_on_cpu(one.tensor) for one in graph.values):
        return None
    with torch.inference_mode(False), torch.no_grad():
        return RecordedReplay(graph)


def _unreplayable(op: str) -> ToolkitError:
    return ToolkitError(
        f"a graph with fixed addresses must not read values on the host, got {op}; run this forward eagerly."
    )


def _is_strided_on_cpu(tensor: Tensor) -> bool:
    plain = tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg()
    return tensor.device.type == "cpu" and plain


@dataclass(eq=False)
class _Memory:
    """Recorded memory and the tensors over it."""

    storage: torch.UntypedStorage
    address: int = 0
    tensors: list[Tensor] = field(default_factory=list)

    def tensor(self, like: Tensor) -> Tensor:
        """A tensor over this memory, of the place, shape and strides that ``like`` has in its own."""
        made = torch.empty(0, dtype=like.dtype, device=like.device)
        made.set_(self.storage, like.storage_offset(), like.size(), like.stride())
        self.tensors.append(made)
        return made

    def poison(self) -> None:
        """Fill it with what shows when it is read: NaN, or the least integer."""
        dtype = self.tensors[0].dtype
        whole = torch.empty(0, dtype=dtype).set_(self.storage)
        if dtype.is_floating_point or dtype.is_complex:
            whole.fill_(float("nan"))
        else:
            whole.fill_(True if dtype is torch.bool else torch.iinfo(dtype).min)

    def detach_if_moved(self) -> None:
        """Of a constant: where its storage lies elsewhere now, the old address holds no constant any more."""
        if self.storage.data_ptr() != self.address:
            size = max(_end(tensor) for tensor in self.tensors)
            self.storage = torch.UntypedStorage(size)
            self.address = self.storage.data_ptr()
            for tensor in self.tensors:
                tensor.set_(self.storage, tensor.storage_offset(), tensor.size(), tensor.stride())
            self.poison()


def _end(tensor: Tensor) -> int:
    """Bytes from the begin of its storage to its end, rounded up to whole elements of any dtype."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride())) if tensor.numel() else -1
    return -(-(tensor.storage_offset() + last + 1) * tensor.element_size() // 16) * 16


class RecordedReplay:
    """A graph as a function of its inputs. What it returns is its own memory, valid until the next replay.

    Inputs are read where those of the recording lie; others are copied there.
    """

    def __init__(self, graph: CapturedGraph) -> None:
        self._memories: dict[int, _Memory] = {}
        self._tensors: dict[Value, Tensor] = {}
        self._constants: list[Tensor] = []
        self._own: list[_Memory] = []
        self._steps: list[_Step] = []
        self._inputs = [self._recorded(value) for value in graph.inputs]
        for node in graph.nodes:
            self._record(node)
        self._output = self._recorded(graph.output)
        self._constant_memories = [one for one in self._memories.values() if one.address]
        self._addresses = addresses(self._constants)

    def addresses_hold(self) -> bool:
        """Whether every constant lies where it lay at recording, in the same shape, strides and dtype."""
        return addresses(self._constants) == self._addresses

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether ``inputs`` are of the recorded shapes, strides and dtypes."""
        return all(map(_fits, inputs, self._inputs))

    def __call__(self, *inputs: Tensor) -> Tensor:
        with torch.no_grad():
            for constant in self._constant_memories:
                constant.detach_if_moved()
            for memory in self._own:
                memory.poison()
            for own, given in zip(self._inputs, inputs, strict=True):
                if own.data_ptr() != given.data_ptr():
                    own.copy_(given)
            for step in self._steps:
                step.run()
        return self._output

    def _record(self, node: Node) -> None:
        args = mapped(node.args, self._recorded)
        kwargs = {name: mapped(argument, self._recorded) for name, argument in node.kwargs.items()}
        fresh = {value for value in node.results if _key(value.tensor) not in self._memories}
        results = [self._recorded(value) if value in fresh else None for value in node.results]
        for value in node.results:
            self._recorded(value)
        if fresh or node.writes or not node.results:  # else views of recorded memory, with nothing to run
            self._steps.append(_Step(node, args, kwargs, results))

    def _recorded(self, value: Value) -> Tensor:
        """The tensor over recorded memory that stands for ``value``."""
        if value not in self._tensors:
            key = _key(value.tensor)
            if key not in self._memories:
                self._memories[key] = self._memory(value)
            self._tensors[value] = self._memories[key].tensor(value.tensor)
            if value.kind == "constant":
                self._constants.append(value.tensor)
        return self._tensors[value]

    def _memory(self, value: Value) -> _Memory:
        storage = value.tensor.untyped_storage()
        if value.kind == "constant":
            return _Memory(storage, storage.data_ptr())
        if value.kind == "input":
            return _Memory(storage)
        memory = _Memory(torch.UntypedStorage(storage.nbytes()))
        if value.kind == "result":
            self._own.append(memory)
        return memory


@dataclass(eq=False)
class _Step:
    """One call of an op on recorded tensors."""

    node: Node
    args: tuple[Argument, ...]
    kwargs: dict[str, Argument]
    kept: list[Tensor | None]  # where each result is copied to; None for one that is recorded memory already

    def run(self) -> None:
        found = list(_tensors_in(self.node.op(*self.args, **self.kwargs)))
        for kept, result in zip(self.kept, found, strict=True):
            if kept is not None:
                if kept.shape != result.shape:
                    raise ToolkitError(
                        f"a result of {self.node.op} must have the recorded shape {tuple(kept.shape)}, got "
                        f"{tuple(result.shape)}; run this forward eagerly."
                    )
                kept.copy_(result)


def _fits(given: Tensor, own: Tensor) -> bool:
    return given.dtype == own.dtype and given.shape == own.shape and given.stride() == own.stride()


def _tensors_in(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [one for item in result for one in _tensors_in(item)] if isinstance(result, (list, tuple)) else []


def _key(tensor: Tensor) -> int:
    """The number of a storage; the graph keeps its tensors, so that none is given twice."""
    return int(tensor.untyped_storage()._cdata)


_SHAPE: Callable[[Tensor], torch.Size] = Tensor.shape.__get__  # type: ignore[attr-defined]
_DTYPE: Callable[[Tensor], torch.dtype] = Tensor.dtype.__get__  # type: ignore[attr-defined]


def addresses(tensors: list[Tensor]) -> list[list[Any]]:
    """Where tensors lie and how: one pass in C each. Empty where one has no memory. No two devices share an address."""
    try:
        found: list[list[Any]] = [list(map(Tensor.data_ptr, tensors)), list(map(_SHAPE, tensors))]
    except RuntimeError:
        return []
    return [*found, list(map(Tensor.stride, tensors)), list(map(_DTYPE, tensors))]
