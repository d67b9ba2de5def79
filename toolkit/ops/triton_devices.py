"""What every Triton launcher asks: which row of a tile table serves a device, and which dtypes kernels take."""

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


def check_dtype(op: str, dtype: torch.dtype) -> None:
    """ToolkitError for a dtype that no kernel takes."""
    if dtype not in FLOATS:
        raise ToolkitError(f"dtype must be float32, bfloat16 or float16 in the Triton kernels of {op}, got {dtype}.")


def check_gemm_dtype(op: str, dtype: torch.dtype, arch: str) -> None:
    """``check_dtype`` for kernels with a GEMM, which the interpreter cannot run in bfloat16."""
    check_dtype(op, dtype)
    if arch == "interpreter" and dtype == torch.bfloat16:  # it would multiply the raw 16-bit integers
        raise ToolkitError(f"dtype must be float32 or float16 in Triton's interpreter, got bfloat16 for {op}.")
