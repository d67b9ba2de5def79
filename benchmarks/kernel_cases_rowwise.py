"""Triton kernels of the row-wise ops to compile ahead of time."""

from collections.abc import Callable

import torch

WIDTHS = (512, 4096, 8192)


def rms_norm_case(dtype: torch.dtype, width: int) -> Callable:
    """The rms_norm kernels, forward and backward."""

    def call() -> None:
        from toolkit.ops.rms_norm.triton import rms_norm, rms_norm_backward

        x = torch.empty(64, width, dtype=dtype)
        weight = torch.empty(width, dtype=dtype)
        rms_norm(x, weight, 1e-6, 0.0)
        rms_norm_backward(x, x, weight, 1e-6, 0.0)

    return call


def cases() -> dict[str, Callable]:
    """Every kernel with every shipped tile: name -> the call that launches it."""
    found: dict[str, Callable] = {}
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for width in WIDTHS:
            found[f"rms_norm {short} {width}"] = rms_norm_case(dtype, width)
    return found
