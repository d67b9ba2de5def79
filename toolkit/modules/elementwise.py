"""Elementwise functions of a model's own code, with bits that do not depend on the rows beside an element.

Torch's vectorised loops on the CPU treat what is left over at the end of a flat tensor with other code than the rest,
so the last bit of a sigmoid depends on how many rows there are. Inside ``row_invariant`` the functions that models
call between their modules (gates, time steps) are the op ``activation`` instead, whose elements stand alone.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

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


class _RowInvariant(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = _KINDS.get(func)
        # Only the plain call: a softplus of another slope, or one in place, is left to torch.
        if kind is not None and len(args) == 1 and not (kwargs and any(kwargs.values())):
            (x,) = args
            if isinstance(x, Tensor) and x.is_cpu and x.is_floating_point():
                return activation(x, kind)
        return func(*args, **(kwargs or {}))


@contextmanager
def row_invariant() -> Iterator[None]:
    """See the module. Of this thread only; inside itself it changes nothing."""
    if getattr(_thread, "on", False):
        yield
        return
    _thread.on = True
    try:
        with _RowInvariant():
            yield
    finally:
        _thread.on = False
