"""The matrix kernels with the shapes of a 4 B model, for ``python -m tools.compile_kernels``."""

from collections.abc import Callable
from unittest import mock

import torch

# (N, K) of the projections and the MLP of a 4 B model.
SHAPES = ((4096, 2560), (9728, 2560), (2560, 9728))


def linear_case(dtype: torch.dtype, outputs: int, depth: int, rows: int = 512) -> Callable:
    """A call of ``linear`` without bias."""

    def call() -> None:
        from toolkit.ops.linear.triton import linear

        linear(torch.empty(rows, depth, dtype=dtype), torch.empty(outputs, depth, dtype=dtype), None)

    return call


def few_rows_case(outputs: int, depth: int) -> Callable:
    """A call of ``linear`` with each candidate for few rows of the target, in bfloat16."""

    def call() -> None:
        from toolkit.ops import triton_devices
        from toolkit.ops.linear import tiles

        tried = tiles.DECODE_CANDIDATES[triton_devices.architecture(torch.device("cpu"))][2]
        for tile in tried:
            with mock.patch.object(tiles, "find", return_value=tile):
                linear_case(torch.bfloat16, outputs, depth, rows=1)()

    return call


def lora_case(dtype: torch.dtype, outputs: int, depth: int, rank: int, *, scaled: bool = False) -> Callable:
    """A call of ``lora_add`` with two adapters, forward and backward: each of its kernels. ``scaled``: as for DoRA."""

    def call() -> None:
        from toolkit.ops.lora_linear.triton import lora_add
        from toolkit.ops.lora_linear.triton_backward import lora_add_backward

        base, x = torch.empty(512, outputs, dtype=dtype), torch.empty(512, depth, dtype=dtype)
        a = [torch.empty(one, depth, dtype=dtype) for one in (rank, 4)]
        b = [torch.empty(outputs, one, dtype=dtype) for one in (rank, 4)]
        scales = [torch.empty(size, dtype=dtype) for size in (outputs, 0)] if scaled else []
        plan = [1.0, 2.0], torch.arange(512) % 2, None, scales, base[0] if scaled else None
        some = [True, False]
        lora_add(base, x, a, b, *plan)
        lora_add_backward(base, base, x, a, b, *plan, scaled, True, some, some, some[: len(scales)], scaled)

    return call


def logprob_case(
    dtype: torch.dtype, vocabulary: int = 151936, depth: int = 2560, *, whole: bool = False, rows: int = 512
) -> Callable:
    """A call of ``linear_logprob``, forward and backward; ``whole`` with bias, cap and temperature."""

    def call() -> None:
        from toolkit.ops.linear_logprob.triton import linear_logprob
        from toolkit.ops.linear_logprob.triton_backward import linear_logprob_backward

        hidden, weight = torch.empty(rows, depth, dtype=dtype), torch.empty(vocabulary, depth, dtype=dtype)
        bias = torch.empty(vocabulary, dtype=dtype) if whole else None
        heat, softcap = (torch.ones(rows), 30.0) if whole else (None, 0.0)
        targets, row = torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows)
        linear_logprob(hidden, weight, bias, targets, heat, 1.0, softcap, 0)
        linear_logprob_backward(
            row[:, None], row, row, row, hidden, weight, bias, targets, heat, row, row, 1.0, softcap, True, False, False
        )  # the gradients of weight and bias launch no kernel of the project, and would be computed here

    return call


def cases() -> dict[str, Callable]:
    """name -> the call that launches the kernels."""
    found: dict[str, Callable] = {}
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for outputs, depth in SHAPES:
            found[f"linear {short} {outputs}x{depth}"] = linear_case(dtype, outputs, depth)
        if short == "bf16":
            found["linear bf16 2560x4096 few rows"] = few_rows_case(2560, 4096)
        found[f"linear {short} uneven"] = linear_case(dtype, 1000, 1001)
        for rank in (8, 16, 64):
            found[f"lora_add {short} 9728x2560 rank {rank}"] = lora_case(dtype, 9728, 2560, rank)
        found[f"lora_add {short} uneven rank 12"] = lora_case(dtype, 1000, 1001, 12)
        found[f"lora_add {short} 9728x2560 DoRA"] = lora_case(dtype, 9728, 2560, 16, scaled=True)
        found[f"lora_add {short} uneven DoRA"] = lora_case(dtype, 1000, 1001, 12, scaled=True)
        found[f"linear_logprob {short} 151936x2560"] = logprob_case(dtype)
        found[f"linear_logprob {short} all options"] = logprob_case(dtype, 5000, 2560, whole=True)
        found[f"linear_logprob {short} uneven"] = logprob_case(dtype, 5001, 1001)
    return found
