"""What every Triton launcher asks: which row of a tile table serves a device, and which dtypes kernels take."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from toolkit.errors import ToolkitError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def architecture(device: torch.device) -> str:
    """The row of the tables that serves ``device``; CPU tensors mean Triton's interpreter."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # 12.x is consumer Blackwell: mma.sync and about 100 KiB of shared memory, so it takes sm_80's tiles.
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


@cache
def device_name(device: torch.device) -> str:
    """What was measured on a device is kept under this name."""
    return "interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)


def check_dtype(op: str, dtype: torch.dtype) -> None:
    """ToolkitError for a dtype that no kernel takes."""
    if dtype not in FLOATS:
        raise ToolkitError(f"dtype must be float32, bfloat16 or float16 in the Triton kernels of {op}, got {dtype}.")


def check_gemm_dtype(op: str, dtype: torch.dtype, arch: str) -> None:
    """``check_dtype`` for kernels with a GEMM, which the interpreter cannot run in bfloat16."""
    check_dtype(op, dtype)
    if arch == "interpreter" and dtype == torch.bfloat16:  # it would multiply the raw 16-bit integers
        raise ToolkitError(f"dtype must be float32 or float16 in Triton's interpreter, got bfloat16 for {op}.")


def on_device_of(values: Iterable[Any]) -> AbstractContextManager[Any]:
    """Makes the CUDA device of the first tensor in ``values``, or in a list there, the current one; else does nothing.

    Triton launches on the current device and does not look at those of its arguments.
    """
    device = _first_device(values)
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _first_device(values: Iterable[Any]) -> torch.device | None:
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device
        if isinstance(value, list | tuple) and (found := _first_device(value)) is not None:
            return found
    return None
