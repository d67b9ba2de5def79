"""lora_add, bit for bit: an adapter's outputs and gradients are those that it has alone, on any number of threads."""

import random
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.helpers.implementations import NATIVE, REFERENCE, SMALL, TRITON, impl_and_dtype, implementations
from tests.helpers.lora import Batch, evaluate, make_batch
from tests.helpers.rowwise import THREADS, threads
from toolkit.ops.lora_linear import tiles

FAST = [torch.float32, torch.bfloat16, torch.float16]
ROWS = {"y", "base", "x"}  # results with one row for each row of the batch


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """In the interpreter: several splits and blocks of rows at small sizes."""
    if SMALL:
        monkeypatch.setattr(tiles, "SPLIT", 64)
        monkeypatch.setattr(tiles, "SUMMED_ROWS", 32)


def batch_of(impl, dtype: torch.dtype, seed: int = 0) -> Batch:
    few = SMALL and impl is TRITON
    sizes = (50, 90, 40) if few else (150, 530, 70)
    ranks, slices = (1, 64, 7, 16, 33), (0, 0, 3, 0, 1)
    scaled = (False, True, True, False, False)
    return make_batch(*sizes, ranks, dtype, slices=slices, scaled=scaled, seed=seed)


def gradient(batch: Batch, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(batch.base.shape, generator=generator, device="cpu").to(batch.base)


@impl_and_dtype(FAST)
def test_each_adapter_of_a_batch_is_what_it_is_alone(impl, dtype):
    """Output, and the gradient to rows, factors and scales, for schedules that mix adapters anyhow."""
    rng = random.Random(0)
    allowed = (1,) if impl is REFERENCE else THREADS  # the order of its gradients' sums is torch's
    for trial in range(2 if SMALL and impl is TRITON else 6):
        batch = batch_of(impl, dtype, seed=trial)
        count = len(batch.x)
        chosen = torch.randperm(count)[: rng.randrange(count // 2, count)]
        mixed, grad = batch.rows(chosen), gradient(batch)[chosen]
        with threads(rng.choice(allowed)):
            whole = evaluate(Batch.__call__, mixed, grad)
        for adapter in range(len(batch.a)):
            own = mixed.adapters == adapter
            with threads(rng.choice(allowed)):
                alone = evaluate(Batch.__call__, mixed.only(adapter), grad[own])
            for name, value in alone.items():
                if name in ROWS:
                    assert torch.equal(value, whole[name][own]), name
                elif name != "bias":  # the layer's, which its adapters share
                    assert torch.equal(value, whole[f"{name[0]}{adapter}"]), name


@impl_and_dtype(FAST)
def test_a_row_is_what_it_is_beside_any_rows(impl, dtype):
    rng = random.Random(1)
    batch = batch_of(impl, dtype)
    grad, count = gradient(batch), len(batch.x)
    whole = evaluate(Batch.__call__, batch, grad)
    for trial in range(2 if SMALL and impl is TRITON else 12):
        with threads(THREADS[trial % len(THREADS)]):
            chosen = torch.randperm(count)[: rng.choice([1, 2, 5, 33, 64, 150])]
            some = evaluate(Batch.__call__, batch.rows(chosen), grad[chosen])
            assert torch.equal(some["y"], whole["y"][chosen])
            assert torch.equal(some["base"], whole["base"][chosen])
            if impl is not REFERENCE:  # the order of its sums is torch's
                assert torch.equal(some["x"], whole["x"][chosen])
            keep, one = torch.rand(count) < 0.3, torch.randint(-1, 2, (count,))
            other = torch.where(keep, batch.adapters, one)
            groups = torch.where(keep, batch.groups, torch.zeros_like(other))
            assert torch.equal(replace(batch, adapters=other, groups=groups)()[keep], whole["y"][keep])


@impl_and_dtype([torch.float32])
def test_under_checkpointing(impl, dtype):
    batch = batch_of(impl, dtype)
    grad = gradient(batch)
    whole = evaluate(Batch.__call__, batch, grad)
    found = evaluate(lambda given: checkpoint(given, use_reentrant=False), batch, grad)
    assert found.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in found.items())


@implementations(NATIVE)
@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize(
    ("rows", "inner", "outputs", "ranks"),
    [
        (32, 1536, 768, (64,)),
        (32, 576, 1536, (4, 8, 16, 32, 64) * 3),
        (7, 1536, 1000, (40, 2)),
        (700, 300, 170, (8,)),
        (700, 300, 170, (8, 9, 16)),
    ],
)
@pytest.mark.usefixtures("impl")
def test_threads_change_nothing(rows, inner, outputs, ranks, adjacent):
    """Blocks that threads take whole and in parts, rows in place and gathered."""
    scaled = [at % 2 == 1 for at in range(len(ranks))]
    batch = make_batch(rows, inner, outputs, ranks, scaled=scaled)
    if adjacent:
        batch = replace(batch, adapters=batch.adapters.sort().values)
    grad = gradient(batch)
    found = []
    for count in (1, 2, 2, 3):
        with threads(count):
            found.append(evaluate(Batch.__call__, batch, grad))
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())
    order = torch.randperm(rows)
    shuffled = evaluate(Batch.__call__, batch.rows(order), grad[order])
    assert all(torch.equal(shuffled[name], found[0][name][order]) for name in ROWS)


@implementations(NATIVE)
@pytest.mark.usefixtures("impl")
def test_gradients_of_weights_are_sums_of_blocks_in_order():
    """Of 600 rows: what the first 256 give, then the next 256, then the rest."""
    batch = make_batch(600, 40, 30, (5,), scaled=(True,), bias=False)
    batch = replace(batch, adapters=torch.zeros_like(batch.adapters))
    grad = gradient(batch)
    whole, parts = evaluate(Batch.__call__, batch, grad), []
    for rows in torch.arange(600).split(256):
        parts.append(evaluate(Batch.__call__, batch.rows(rows), grad[rows]))
    for name in ("a0", "b0", "c0"):
        assert torch.equal(whole[name], parts[0][name] + parts[1][name] + parts[2][name]), name
