"""What reference implementations need to be batch-invariant on CPU.

Eager torch evaluates exp, erf, tanh and the like with vector code, but takes the last few elements of every
thread's share of the flat tensor through scalar code with other rounding; and it splits one long sum over
threads. ``elementwise`` and ``row_sum`` avoid both.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from toolkit.errors import ToolkitError

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_GRAIN = 32768  # elements below which torch's elementwise kernels stay on one thread
_VECTOR = 64  # a multiple of the elements that any of those kernels takes in one step
_BLOCK = 4096  # columns that are summed in one go


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for narrower formats; ToolkitError for other dtypes."""
    if x.dtype not in _FLOATS:
        raise ToolkitError(f"dtype must be float32, float64, bfloat16 or float16, got {x.dtype}.")
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_row(name: str, parameter: Tensor | None, x: Tensor) -> None:
    """ToolkitError unless ``parameter`` is None or has one value for each column of x."""
    if parameter is not None and parameter.shape != x.shape[-1:]:
        raise ToolkitError(
            f"{name} must have shape [{x.shape[-1]}] for x of shape {list(x.shape)}, got {list(parameter.shape)}."
        )


def upcast(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x, contiguous, in the dtype that x (or ``like``) is computed in."""
    return x.to(compute_dtype(x if like is None else like)).contiguous()


def elementwise(function: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    """``function(x, *others)``, all of x's shape, where every element takes the vector path.

    On CPU the flat tensor is padded so that each thread's share is a whole number of vectors; elsewhere
    kernels have no such tail and the call is plain. ``function`` must work element by element. Differentiable
    where it is.
    """
    if x.device.type != "cpu":
        return function(x, *others)
    threads, size = 1, x.numel()
    while True:
        shares = min(threads, torch.get_num_threads())
        padded = -(-size // (_VECTOR * shares)) * _VECTOR * shares
        needed = -(-padded // _GRAIN) if padded >= _GRAIN else 1
        if min(needed, torch.get_num_threads()) <= shares:
            break
        threads = needed
    return function(*(pad(y.reshape(-1), (0, padded - size)) for y in (x, *others)))[:size].view(x.shape)


def row_sum(x: Tensor) -> Tensor:
    """``x.sum(-1, keepdim=True)``, long rows in fixed blocks so that no sum is split over threads."""
    width = x.shape[-1]
    if width <= _BLOCK:
        return x.sum(-1, keepdim=True)
    blocks = pad(x, (0, -width % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    total: Tensor = blocks.sum(-1).sum(-1, keepdim=True)
    return total
