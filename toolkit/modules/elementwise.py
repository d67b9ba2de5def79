"""Functions of a model's own code, batch-invariant.

Torch's vectorised loops on the CPU run other code for the end of a flat tensor than for the rest, so the last bit of a
sigmoid depends on the number of rows; so does that of an MKL GEMM. Inside ``row_invariant`` the functions that models
call between their modules (gates, time steps, routers and experts that no role claims) are the batch-invariant ops
``activation`` and ``linear`` instead, and of equal values topk takes the one of the lowest index, as the op ``route``.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from toolkit.modules.linear import autocast_linear
from toolkit.ops.activation import activation

_thread = threading.local()
_KINDS: dict[Callable[..., Any], str] = {
    torch.sigmoid: "sigmoid",
    Tensor.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    torch.special.expit: "sigmoid",
    F.silu: "silu",
    F.softplus: "softplus",
    torch.tanh: "tanh",
    Tensor.tanh: "tanh",
    F.tanh: "tanh",
}


def _on_cpu(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_cpu and x.is_floating_point()


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if _on_cpu(input) and weight.dim() == 2 and input.dtype == weight.dtype:
        return autocast_linear(input, weight, bias)
    return NotImplemented


def _matmul(input: Any, other: Any) -> Any:
    """A GEMM with one weight for all rows: transposed, [K, N], or times rows that are columns, [N, K] @ [..., K, T]."""
    if not (_on_cpu(input) and isinstance(other, Tensor)):
        return NotImplemented
    if input.dim() > 1 and other.dim() == 2:
        return _linear(input, other.t())
    if input.dim() == 2 and other.dim() > 2:
        columns = _linear(other.mT, input)
        return columns if columns is NotImplemented else columns.mT
    if (
        input.dim() == other.dim() > 2
        and isinstance(input._base, nn.Parameter)
        and input.shape[:-2] == other.shape[:-2]
    ):
        weights, rows = input.flatten(0, -3), other.flatten(0, -3)  # of heads, [H, 1, N, K] @ [H, 1, K, T]
        each = [autocast_linear(x.mT, weight, None).mT for x, weight in zip(rows, weights, strict=True)]
        return torch.stack(each).unflatten(0, other.shape[:-2])
    return NotImplemented


def _bmm(input: Any, mat2: Any) -> Any:
    """GEMMs with each expert's weight [E, K, N], one after the other."""
    if _on_cpu(input) and isinstance(mat2, nn.Parameter) and input.dtype == mat2.dtype:
        return torch.stack([autocast_linear(rows, weight.t(), None) for rows, weight in zip(input, mat2, strict=True)])
    return NotImplemented


def _topk(input: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if _on_cpu(input) and largest and input.dim() and dim in (-1, input.dim() - 1):
        values, indices = torch.sort(input, dim=-1, descending=True, stable=True)
        return torch.return_types.topk((values[..., :k], indices[..., :k]))
    return NotImplemented


def _exp(input: Any) -> Any:
    """exp that remembers of what, for a softplus that is written out: log(1 + exp(x))."""
    if not _on_cpu(input):
        return NotImplemented
    result = torch.exp(input)
    result.exponent = input  # type: ignore[attr-defined]
    return result


def _add(input: Any, other: Any, **options: Any) -> Any:
    exponent = getattr(input, "exponent", None)
    if exponent is None or options or not isinstance(other, (int, float)) or other != 1:
        return NotImplemented
    result = input + other
    result.softplus_of = exponent
    return result


def _log(input: Any) -> Any:
    x = getattr(input, "softplus_of", None)
    return NotImplemented if x is None else activation(x, "softplus")


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.exp: _exp,
    Tensor.exp: _exp,
    torch.add: _add,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
    torch.log: _log,
    Tensor.log: _log,
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
    torch.topk: _topk,
    Tensor.topk: _topk,
}


class _RowInvariant(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _KINDS.get(func)
        # Only the plain call: a softplus of another slope, or one in place, stays torch's.
        if kind is not None and len(args) == 1 and not any(kwargs.values()) and _on_cpu(args[0]):
            return activation(args[0], kind)
        own = _FUNCTIONS.get(func)
        result = NotImplemented if own is None or "out" in kwargs else own(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


@contextmanager
def row_invariant() -> Iterator[None]:
    """Batch-invariant functions in this thread; nested uses change nothing."""
    if getattr(_thread, "on", False):
        yield
        return
    _thread.on = True
    try:
        with _RowInvariant():
            yield
    finally:
        _thread.on = False
