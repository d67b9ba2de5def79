"""attention: the bits of a row do not depend on the schedule, on other sequences, on threads or on later keys."""

import random

import pytest
import torch

from tests.helpers.attention import dense, make, packed, random_chunks, run_in_pages
from tests.helpers.implementations import NATIVE, SMALL, TRITON, impl_and, implementations, parameter
from tests.helpers.prefix_trees import error
from tests.helpers.rowwise import THREADS, seeded, threads
from toolkit.ops.attention import attention, attention_backward

kernels = implementations(NATIVE, TRITON)  # torch chooses the order of the reference's sums
SHAPES = [  # Hq, Hkv, D, Dv, window, softcap, dtype
    (2, 2, 64, 64, 0, 0.0, torch.float32),
    (4, 1, 32, 32, 50, 0.0, torch.float32),
    (7, 1, 20, 12, 0, 8.0, torch.float32),
    (4, 2, 128, 96, 70, 3.0, torch.float32),
    (16, 8, 8, 8, 0, 0.0, torch.float32),
    (4, 2, 20, 24, 70, 0.0, torch.float64),
]
FEW = [(6, 2, 24, 24, 0, 0.0, torch.float32), (6, 2, 24, 12, 7, 20.0, torch.float32)]  # for the interpreter


@pytest.mark.parametrize(
    ("impl", "shape"),
    [parameter(NATIVE, shape) for shape in SHAPES]
    + [parameter(TRITON, FEW[0], marks=[pytest.mark.sweep] if SMALL else []), parameter(TRITON, FEW[1])],
    indirect=["impl"],
)
def test_bits_do_not_depend_on_schedule(impl, shape):
    """Prefill in chunks and decode, in blocks of several sizes, alone and beside others, on 1 and 2 threads.

    A Triton tile reads the keys behind the window that share it with visible ones, so there the pages stay.
    """
    hq, hkv, d, dv, window, softcap, dtype = shape
    rng = random.Random(repr(shape))
    few = SMALL and impl is TRITON
    lengths = [17, 1] if few else [70, 1, 135]
    plan, rows = packed(lengths)
    q, k, v = make(rows, hq, hkv, d, dv, dtype)
    expected = attention(q, k, v, *plan, None, 0, 0.2, window, softcap)
    assert error(expected[0], dense(*(x.double() for x in (q, k, v)), plan, 0.2, window, softcap)[0]) < 3e-6
    one_by_one = [[(s, 1) for s, n in enumerate(lengths) if i < n] for i in range(max(lengths))]
    for i, block_size in enumerate((16, 4) if few else (4, 16, 48)):
        with threads(THREADS[i % len(THREADS)]):
            schedules = [one_by_one] if i == 1 else []
            schedules += [random_chunks(lengths, largest, rng) for largest in ((100,) if few else (5, 100))]
            for chunks in schedules:
                found = run_in_pages(
                    q, k, v, lengths, chunks, block_size, window, softcap, rng, forget=impl is not TRITON
                )
                for actual, want in zip(found, expected):
                    assert torch.equal(actual, want)
            for actual, want in zip(attention(q, k, v, *plan, None, 0, 0.2, window, softcap), expected):
                assert torch.equal(actual, want)


@kernels
def test_bits_do_not_depend_on_other_sequences(impl):
    """A sequence alone, and among others that hold infinities."""
    first, own, last = (10, 9, 11) if SMALL and impl is TRITON else (100, 90, 110)
    q, k, v = make(first + own + last, 4, 2, 48, 48, torch.float32)
    mine = slice(first, first + own)
    alone = attention(q[mine], k[mine], v[mine], *packed([own])[0])[0]
    k[first + own :], v[:first] = torch.inf, torch.nan
    among = attention(q, k, v, *packed([first, own, last])[0])[0]
    assert torch.equal(among[mine], alone)


@implementations(NATIVE)  # a Triton tile multiplies what it hides by zero
@pytest.mark.usefixtures("impl")
def test_later_keys_are_not_read():
    """NaN in the keys after a row leaves the row and its gradient alone."""
    total, first = 150, 97
    plan, rows = packed([total])
    q, k, v = make(rows, 2, 2, 24, 24, torch.float32)
    clean = attention(q, k, v, *plan)
    k[first:], v[first:] = torch.nan, torch.inf
    out, lse = attention(q, k, v, *plan)
    assert torch.equal(out[:first], clean[0][:first])
    assert torch.equal(lse[:first], clean[1][:first])
    assert not out[first:].isfinite().any()
    grads = [attention_backward(torch.ones_like(out), q, k, v, *x, *plan, 0.2)[0][:first] for x in (clean, (out, lse))]
    assert grads[1].isfinite().all()
    window = attention(q, k.flip(0), v.flip(0), *plan, None, 0, 0.2, 9)[0]
    assert window[total - first + 8 :].isfinite().all()
    assert not window[total - first + 7].isfinite().any()


@impl_and("hq, hkv, lengths", [(4, 2, [100, 17, 130]), (6, 1, [300])], [(4, 2, [100, 17, 130])], (NATIVE, TRITON))
def test_gradients_are_the_same_on_every_run_and_any_threads(impl, hq, hkv, lengths):
    lengths = [n // 10 for n in lengths] if SMALL and impl is TRITON else lengths
    plan, rows = packed(lengths)
    q, k, v = make(rows, hq, hkv, 32, 32, torch.float32)
    grad = seeded(rows, hq, 32, dtype=torch.float32, seed=9)
    out, lse = attention(q, k, v, *plan)
    results = []
    for count in (1, *THREADS, 3):
        with threads(count):
            results.append(attention_backward(grad, q, k, v, out, lse, *plan, 0.2, 40))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0]))
