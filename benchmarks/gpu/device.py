"""What the GPU suite stands on: the device, and timing by device events.

With ``TOOLKIT_GPU_TESTS=cpu`` and ``TRITON_INTERPRET=1`` set, the suite runs on CPU tensors through Triton's
interpreter, at small sizes and without timing: so its code is proven on machines without a GPU.
"""

import importlib
import os
import pkgutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import as_tuple

DRY = os.environ.get("TOOLKIT_GPU_TESTS") == "cpu"
DEVICE = "cpu" if DRY else "cuda"
# Triton's interpreter computes with numpy, which has no bfloat16.
HALF = torch.float16 if DRY else torch.bfloat16
# Largest relative error, norm by norm, of results and gradients against float64.
GATE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def triton_on_cpu() -> None:
    """Let the Triton kernels serve the ops on CPU tensors, through the dispatcher and autograd as on a GPU."""
    from toolkit import ops
    from toolkit.ops import registry

    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET is not 1; without it the Triton kernels take no CPU tensors.")
    mend_interpreter()
    for entry in pkgutil.iter_modules(ops.__path__):
        if entry.ispkg and entry.name != "native":
            importlib.import_module(f"toolkit.ops.{entry.name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it replaces kernels, on purpose
        for op in registry._OPS.values():
            if op.triton is not None:
                registry._LIBRARY.impl(op.name, op.triton, "CPU", allow_override=True)


@cache
def mend_interpreter() -> None:
    """Triton 3.6's interpreter takes Python numbers from arrays of one element, which NumPy 2.4 refuses: from their one
    element instead. Later versions of Triton do so themselves."""
    if not version("triton").startswith("3.6."):
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


def median(call: Callable[[], Any], milliseconds: int = 100) -> float:
    """Median seconds of a call by device events, L2 cold each time; dry: the call is made, and takes a second."""
    if DRY:
        call()
        return 1.0
    import triton.testing

    taken: Any = triton.testing.do_bench(call, warmup=25, rep=milliseconds, return_mode="median")
    return float(taken) / 1e3


def replayed(calls: Sequence[Callable[[], Any]]) -> float:
    """Median seconds of one of ``calls``, replayed together from a CUDA graph: the host's share is not in it.

    For work of a few microseconds; each call should have separate operands, or all but the first find them in L2.
    """
    if DRY:
        return median(lambda: [call() for call in calls])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median(graph.replay, 60) / len(calls)


def peak(call: Callable[[], Any]) -> int:
    """Bytes that a call allocates at its peak above what was there before it; dry: 0."""
    if DRY:
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile(function)``; dry: the function itself, for a compiler takes longer than the run may."""
    return function if DRY else torch.compile(function, dynamic=False)


@contextmanager
def reusable_graphs() -> Iterator[None]:
    """Backwards of compiled functions may run more than once: torch gives their saved tensors away otherwise.

    Their peak memory may be larger for it by what would be given away.
    """
    import torch._functorch.config as config

    with config.patch(donated_buffer=False):
        yield


def normal(*shape: int, dtype: torch.dtype = HALF, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def doubles(values: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in values]


def measure(call: Callable[..., Any], leaves: Sequence[Tensor], cotangents: Sequence[Tensor]) -> dict[str, float]:
    """Seconds of a training forward and of its backward, and the bytes that both allocate."""
    wanted = [x for x in leaves if x.requires_grad]
    entry: dict[str, float] = {"forward_s": median(lambda: call(*leaves), 50)}
    outputs = as_tuple(call(*leaves))
    entry["backward_s"] = median(partial(torch.autograd.grad, outputs, wanted, cotangents, retain_graph=True), 50)
    entry["peak_bytes"] = peak(lambda: torch.autograd.grad(as_tuple(call(*leaves)), wanted, cotangents))
    return entry
