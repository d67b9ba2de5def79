"""What tests of Triton launchers share, in Triton's interpreter or on a device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

# The interpreter computes with numpy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16]
# Rounding of the result, and of a few operations before it.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
_empty = torch.empty


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that a launcher leaves to its kernels is NaN (the largest number for integers), so that a gap shows."""

    def fill(*size: Any, **options: Any) -> Tensor:
        made = _empty(*size, **options)
        if made.numel() >= 1 << 24:  # address space that a test reserves, not memory
            return made
        with torch.no_grad():  # torch.empty may be asked for a leaf that requires grad
            return made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).max)

    with mock.patch.object(torch, "empty", fill):
        yield


def noise(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal numbers, the same ones on every device."""
    values = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu") * scale
    return values.to(torch.get_default_device(), dtype)


def far_apart(rows: Tensor) -> Tensor:
    """The same rows with more than 2^31 elements from the first to the last: untouched memory costs nothing."""
    count = rows.shape[0]
    stride = 2**31 // (count - 1) // 16 * 16 + 16
    storage = _empty((count - 1) * stride + rows[0].numel(), dtype=rows.dtype)
    view = storage.as_strided(rows.shape, (stride, *rows[0].contiguous().stride()))
    assert (count - 1) * stride > 2**31
    return view.copy_(rows)


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Equal to ``tolerance`` of the largest value wanted (of 0.1 where that is smaller)."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    if got.numel():
        error = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(0.1)
        assert error <= tolerance, float(error)  # false for NaN


def gradients(oracle: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Gradients of ``oracle`` in float64 to the floating-point ``inputs``, for upstream ``grads``."""
    leaves = [x.double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = oracle(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    wanted = [x for x in leaves if x.is_floating_point()]
    return list(torch.autograd.grad(outputs, wanted, [g.double() for g in grads]))


def rows_alone(f: Callable[..., Any], inputs: list[Tensor], seed: int = 0) -> None:
    """f of any rows of ``inputs`` has those rows' bits of f of all, and bitwise identical results again."""
    generator = torch.Generator("cpu").manual_seed(seed)
    count = inputs[0].shape[0]

    def call(index: Any) -> list[Tensor]:
        y = f(*(x[index] for x in inputs))
        return list(y) if isinstance(y, tuple) else [y]

    whole = call(slice(None))
    for size in (1, 2, count // 2, count):
        index = torch.randperm(count, generator=generator, device="cpu")[:size].to(inputs[0].device)
        for part, full in zip(call(index), whole):
            assert torch.equal(part, full[index])


def row_by_row(self: Any, a: Any, b: Any, c: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """``tl.dot`` of the interpreter with one order of summation for every output. Its own one is numpy's BLAS, in which
    a row's bits depend on its position in the tile, and would hide what the kernel itself promises."""
    from triton.language import core
    from triton.runtime.interpreter import TensorHandle

    product = (a.data[:, :, None].astype(np.float64) * b.data[None].astype(np.float64)).sum(1)
    return TensorHandle(product.astype(np.float32) + c.data, core.float32)
