"""Triton kernels of sampling to compile ahead of time: a small and a large vocabulary."""

from collections.abc import Callable

import torch

VOCABULARIES = (8192, 151936)


def sample_case(dtype: torch.dtype, vocabulary: int) -> Callable:
    """The kernel that samples one token per row."""

    def call() -> None:
        from toolkit.ops.sample.triton_sample import sample

        some, ids = torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.int64)
        sample(torch.empty(4, vocabulary, dtype=dtype), some, ids, some, some, ids, ids)

    return call


def penalize_case(dtype: torch.dtype, vocabulary: int) -> Callable:
    """The kernels of the penalties."""

    def call() -> None:
        from toolkit.ops.sample.triton import penalize

        some, ids = torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.int64)
        offsets = torch.arange(5)
        penalize(torch.empty(4, vocabulary, dtype=dtype), ids, offsets, ids, some, some, some, ids, offsets)

    return call


def cases() -> dict[str, Callable]:
    """Every kernel with every shipped tile: name -> the call that launches it."""
    found: dict[str, Callable] = {}
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for vocabulary in VOCABULARIES:
            found[f"sample {short} {vocabulary}"] = sample_case(dtype, vocabulary)
            found[f"penalize {short} {vocabulary}"] = penalize_case(dtype, vocabulary)
    return found
