"""Checks shared by the tests of row-wise ops: against a float64 oracle, and bit for bit over schedules."""

import contextlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# What an implementation is held to and takes; ``Implementation.active`` sets them.
BOUNDS = {dtype: (bound, bound) for dtype, bound in TOLERANCE.items()}  # of outputs and of gradients, see ``error``
THREADS: tuple[int, ...] = (1, 2)  # numbers of threads that may not matter
WIDEST = torch.float64  # the most precise dtype


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seeded(*shape: int, dtype: torch.dtype | None = None, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal numbers, the same ones on every device; of the implementation's most precise dtype by default."""
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * scale
    return values.to(torch.get_default_device(), dtype or WIDEST)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """Integers of [low, high), the same ones on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, device="cpu").to(torch.get_default_device())


def run(f: Callable[..., Any], inputs: list[Tensor], seed: int = 7) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of f and the gradients to its floating-point inputs, for outputs weighted with fixed noise."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = f(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    wanted = [x for x in leaves if x.is_floating_point()]
    weights = [seeded(*y.shape, dtype=y.dtype, seed=seed + i) for i, y in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, wanted, weights)
    return [y.detach() for y in outputs], list(grads)


def error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest value wanted (to 0.1 where that is smaller)."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    if not got.numel():
        return 0.0
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(0.1))


def check_oracle(
    f: Callable[..., Any],
    oracle: Callable[..., Any],
    inputs: list[Tensor],
    tolerance: float | tuple[float, float] | None = None,
    dtype_of_outputs: torch.dtype | None = None,
) -> None:
    """Outputs and all gradients of f against those of ``oracle`` on the same numbers in float64.

    tolerance: of outputs and of gradients, or one for both. dtype_of_outputs: of all outputs, where they have one.
    """
    dtype = next(x.dtype for x in inputs if x.is_floating_point())
    bound = BOUNDS[dtype] if tolerance is None else tolerance
    of_outputs, of_gradients = bound if isinstance(bound, tuple) else (bound, bound)
    outputs, grads = run(f, inputs)
    upcast = [x.double() if x.is_floating_point() else x for x in inputs]
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in upcast]
    expected = oracle(*leaves)
    expected = list(expected) if isinstance(expected, tuple) else [expected]
    weights = [seeded(*y.shape, dtype=y.dtype, seed=7 + i).double() for i, y in enumerate(outputs)]
    expected_grads = torch.autograd.grad(expected, [x for x in leaves if x.is_floating_point()], weights)
    bounds = [of_outputs] * len(outputs) + [of_gradients] * len(grads)
    for got, wanted, allowed in zip([*outputs, *grads], [*expected, *expected_grads], bounds, strict=True):
        assert got.isfinite().all()
        assert error(got, wanted.detach()) <= allowed
    assert dtype_of_outputs is None or all(y.dtype == dtype_of_outputs for y in outputs)
    of_floats = [x.dtype for x in inputs if x.is_floating_point()]
    assert [g.dtype for g in grads] == of_floats


def check_rows(f: Callable[..., Any], inputs: list[Tensor], seed: int = 0) -> None:
    """f of any rows of ``inputs`` (each [T, ...]) is bitwise identical to those rows of f of all, on 1 or 2 threads."""
    generator = torch.Generator("cpu").manual_seed(seed)
    rows = inputs[0].shape[0]

    def call(index: Tensor | slice) -> list[Tensor]:
        y = f(*(x[index] for x in inputs))
        return list(y) if isinstance(y, tuple) else [y]

    with threads(1):
        whole = call(slice(None))
    for n in THREADS:
        with threads(n):
            for size in sorted({1, 2, 3, 5, rows // 2, rows}):
                index = torch.randperm(rows, generator=generator, device="cpu")[:size].to(inputs[0].device)
                for part, full in zip(call(index), whole):
                    assert torch.equal(part, full[index]), f"{size} rows on {n} threads"
            cuts = sorted({0, rows, *torch.randint(rows, (4,), generator=generator, device="cpu").tolist()})
            chunks = [call(slice(a, b)) for a, b in pairwise(cuts)]
            for parts, full in zip(zip(*chunks), whole):
                assert torch.equal(torch.cat(parts), full), f"chunks {cuts} on {n} threads"


def check_repeatable(f: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Outputs and gradients are bitwise identical on every run and any number of threads."""
    with threads(1):
        outputs, grads = run(f, inputs)
    for n in (*THREADS, THREADS[-1]):
        with threads(n):
            again_outputs, again_grads = run(f, inputs)
        for a, b in zip([*outputs, *grads], [*again_outputs, *again_grads]):
            assert torch.equal(a, b), f"on {n} threads"
