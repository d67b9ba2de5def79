"""attention against dense fp64 attention, and its result against every other way to compute the same row."""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.attention import Batch
from tests.helpers.implementations import only_triton
from toolkit.errors import ToolkitError
from toolkit.ops.attention import attention, attention_backward
from toolkit.ops.registry import has_native

needs_native = pytest.mark.skipif(not has_native("attention"), reason="the native CPU library is not built")
IMPLS = ["reference", pytest.param("cpu", marks=needs_native)]
NONE_SEEN = -torch.inf


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def packed(lengths, padding=0):
    """The index tensors of sequences that attend to their own rows, and the number of rows."""
    starts = offsets(lengths)
    return (starts, starts[:-1].contiguous(), torch.tensor(lengths, dtype=torch.int64)), sum(lengths) + padding


def make(rows, hq, hkv, d, dv, dtype, seed=0, kv_rows=None):
    g = torch.Generator().manual_seed(seed)
    kv_rows = rows if kv_rows is None else kv_rows
    shapes = (rows, hq, d), (kv_rows, hkv, d), (kv_rows, hkv, dv)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def dense(q, k, v, plan, scale, window=0, softcap=0.0):
    """Per query and head, with Python loops over sequences: explicit softmax in the dtype given."""
    query_offsets, kv_offsets, kv_lengths = (x.tolist() for x in plan)
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype)
    lse = torch.full(q.shape[:2], NONE_SEEN, dtype=q.dtype)
    for s, (start, length) in enumerate(zip(kv_offsets, kv_lengths)):
        first, last = query_offsets[s], query_offsets[s + 1]
        for h in range(q.shape[1]):
            keys, values = k[start : start + length, h // group], v[start : start + length, h // group]
            x = q[first:last, h] @ keys.T * scale
            x = softcap * (x / softcap).tanh() if softcap else x
            position = torch.arange(last - first)[:, None] + length - (last - first)
            key = torch.arange(length)[None]
            hidden = (key > position) | (key <= position - window if window else torch.zeros_like(key > position))
            x = x.masked_fill(hidden, NONE_SEEN)
            seen = ~hidden.all(-1)
            rows = torch.arange(first, last)[seen]
            out = out.index_put((rows, torch.tensor(h)), x[seen].softmax(-1) @ values)
            lse = lse.index_put((rows, torch.tensor(h)), x[seen].logsumexp(-1))
    return out, lse


def error(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1)).item()


LENGTHS = [17, 0, 130, 1]
CASES = [  # D, Dv, Hq, Hkv, window, softcap
    (32, 32, 4, 4, 0, 0.0),
    (40, 24, 4, 2, 7, 0.0),
    (20, 20, 4, 1, 0, 5.0),
    (64, 64, 7, 1, 64, 0.0),
    (96, 64, 2, 1, 0, 0.0),
    (128, 128, 2, 1, 100, 30.0),
    (256, 256, 1, 1, 1, 0.0),
    (5, 3, 3, 3, 0, 0.0),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case, dtype, impl):
    d, dv, hq, hkv, window, softcap = case
    plan, rows = packed(LENGTHS, padding=3)
    q, k, v = make(rows, hq, hkv, d, dv, dtype)
    scale = 1.7 * d**-0.5
    upcast = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = dense(*upcast, plan, scale, window, softcap)
    grad = torch.randn(expected.shape, dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, upcast, grad)
    out, lse = attention(q, k, v, *plan, None, 0, scale, window, softcap, impl=impl)
    grads = attention_backward(grad.to(dtype), q, k, v, out, lse, *plan, scale, window, softcap, impl=impl)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    assert error(out, expected) < tolerance
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    assert error(lse.nan_to_num(0, 0, 0), expected_lse.nan_to_num(0, 0, 0)) < tolerance
    assert (out[-3:] == 0).all()
    for name, actual, want in zip(("dq", "dk", "dv"), grads, expected_grads):
        assert actual.is_contiguous()
        assert error(actual, want) < (1e-10 if dtype == torch.float64 else 1e-5), name


@pytest.mark.parametrize("impl", IMPLS)
def test_against_scaled_dot_product_attention(impl):
    plan, rows = packed([50])
    q, k, v = make(rows, 4, 2, 64, 64, torch.float64)
    out, _ = attention(q, k, v, *plan, impl=impl)
    heads = [x.transpose(0, 1) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(0, 1)
    assert error(out, expected) < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (30, 4.0)])
def test_more_keys_than_queries_and_fewer(impl, window, softcap):
    """Keys before the queries, in any order of rows, with unreferenced rows; and too few keys."""
    plan = offsets([3, 40, 5, 9]), torch.tensor([100, 3, 0, 90]), torch.tensor([150, 70, 2, 0])
    q, k, v = make(57, 4, 2, 32, 16, torch.float64, kv_rows=260)
    upcast = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = dense(*upcast, plan, 0.3, window, softcap)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, upcast, grad)
    out, lse = attention(q, k, v, *plan, None, 0, 0.3, window, softcap, impl=impl)
    assert error(out, expected) < 1e-12
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    assert lse[43:46].isinf().all()  # the first 3 of 5 queries over 2 keys see nothing
    grads = attention_backward(grad, q, k, v, out, lse, *plan, 0.3, window, softcap, impl=impl)
    for actual, want in zip(grads, expected_grads):
        assert error(actual, want) < 1e-10
    assert (grads[1][73:100] == 0).all()
    assert (grads[2][250:] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_sequences_that_share_keys(impl):
    """A common prefix stored once: its gradient is the sum over the sequences."""
    plan = offsets([70, 70, 20]), torch.tensor([0, 0, 10]), torch.tensor([70, 70, 33])
    q, k, v = make(160, 2, 1, 32, 32, torch.float64, kv_rows=70)
    upcast = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, _ = dense(*upcast, plan, 0.2)
    grad = torch.randn_like(expected)
    out, lse = attention(q, k, v, *plan, None, 0, 0.2, impl=impl)
    grads = attention_backward(grad, q, k, v, out, lse, *plan, 0.2, impl=impl)
    for actual, want in zip(grads, torch.autograd.grad(expected, upcast, grad)):
        assert error(actual, want) < 1e-10


def test_autograd():
    plan, rows = packed([13, 30])
    tensors = [x.requires_grad_() for x in make(rows, 2, 1, 8, 4, torch.float64)]
    grad = torch.randn(rows, 2, 4, dtype=torch.float64)
    out, lse = attention(*tensors, *plan)
    assert not lse.requires_grad
    expected, _ = dense(*tensors, plan, 8**-0.5)
    wanted = torch.autograd.grad(expected, tensors, grad)
    for actual, want in zip(torch.autograd.grad(out, tensors, grad), wanted):
        assert error(actual, want) < 1e-10
    out, _ = attention(*tensors, *plan)
    for actual, want in zip(
        torch.autograd.grad(out.sum(), tensors),
        torch.autograd.grad(dense(*tensors, plan, 8**-0.5)[0].sum(), tensors),
    ):
        assert error(actual, want) < 1e-10  # an expanded gradient


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float(impl, dtype):
    plan, rows = packed([33, 70])
    q, k, v = make(rows, 4, 2, 32, 32, dtype)
    out, lse = attention(q, k, v, *plan, impl=impl)
    expected, expected_lse = attention(q.float(), k.float(), v.float(), *plan, impl=impl)
    assert torch.equal(out, expected.to(dtype))
    assert torch.equal(lse, expected_lse)
    grad = torch.randn(out.shape).to(dtype)
    grads = attention_backward(grad, q, k, v, out, lse, *plan, 32**-0.5, impl=impl)
    upcast = attention_backward(
        grad.float(), q.float(), k.float(), v.float(), out.float(), lse, *plan, 32**-0.5, impl=impl
    )
    for actual, want in zip(grads, upcast):
        assert torch.equal(actual, want.to(dtype))


@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl):
    none = torch.zeros(0, dtype=torch.int64)
    q, k, v = make(0, 2, 1, 8, 4, torch.float32)
    out, lse = attention(q, k, v, torch.zeros(1, dtype=torch.int64), none, none, impl=impl)
    assert out.shape == (0, 2, 4)
    assert lse.shape == (0, 2)
    grads = attention_backward(out, q, k, v, out, lse, torch.zeros(1, dtype=torch.int64), none, none, 1.0, impl=impl)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape, (0,)]


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_scores(impl):
    """Scores of +-1e4: the softmax is almost one-hot and stays finite."""
    plan, rows = packed([100])
    q, k, v = make(rows, 2, 2, 16, 16, torch.float32)
    q, k = q * 60, k * 60
    upcast = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = dense(*upcast, plan, 1.0)
    assert expected_lse.abs().max() > 1e4
    out, lse = attention(q, k, v, *plan, None, 0, 1.0, impl=impl)
    assert error(lse, expected_lse) < 1e-6
    assert error(out, expected) < 2e-2  # a score of 1e4 carries an error of 1e-3 in float32
    grad = torch.randn(out.shape)
    for x in attention_backward(grad, q, k, v, out, lse, *plan, 1.0, impl=impl):
        assert x.isfinite().all()


def run_in_pages(q, k, v, lengths, chunks, block_size, window, softcap, rng, spare=3):
    """Attention call by call: chunks[i] lists (sequence, queries) of call i. Unwritten slots hold NaN."""
    pages = [-(-n // block_size) for n in lengths]
    order = list(range(sum(pages) + spare))
    rng.shuffle(order)
    tables = torch.full((len(lengths), max(pages) + 1), -1)
    for s, count in enumerate(pages):
        tables[s, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int64)
    slots = (sum(pages) + spare) * block_size
    pool_k = torch.full((slots, *k.shape[1:]), torch.nan, dtype=k.dtype)
    pool_v = torch.full((slots, *v.shape[1:]), torch.nan, dtype=v.dtype)
    starts, done = offsets(lengths).tolist(), [0] * len(lengths)
    out, lse = (
        torch.full((*q.shape[:2], v.shape[2]), torch.nan, dtype=q.dtype),
        torch.full_like(q[..., 0], torch.nan),
    )
    for call in chunks:
        rows = []
        for s, count in call:
            own = torch.arange(done[s], done[s] + count)
            slot = tables[s, own // block_size] * block_size + own % block_size
            pool_k[slot], pool_v[slot] = k[starts[s] + own], v[starts[s] + own]
            done[s] += count
            rows.append(starts[s] + own)
        batch = [s for s, _ in call]
        taken = tables[batch].clone()
        for i, s in enumerate(batch):  # pages behind the window may be gone
            oldest = done[s] - call[i][1] - window + 1
            if window and oldest > 0:
                taken[i, : oldest // block_size] = -7
        index = torch.cat(rows)
        layout = (
            offsets([count for _, count in call]),
            torch.zeros(len(call), dtype=torch.int64),
            torch.tensor([done[s] for s in batch]),
        )
        out[index], lse[index] = attention(q[index], pool_k, pool_v, *layout, taken, block_size, 0.2, window, softcap)
    assert done == lengths
    return out, lse


def random_chunks(lengths, largest, rng):
    """Random calls: some sequences, each with a random number of its next queries."""
    left, calls = list(lengths), []
    while any(left):
        alive = [s for s, n in enumerate(left) if n]
        call = []
        for s in rng.sample(alive, rng.randint(1, len(alive))):
            count = min(left[s], rng.randint(1, largest))
            left[s] -= count
            call.append((s, count))
        calls.append(call)
    return calls


SHAPES = [  # Hq, Hkv, D, Dv, window, softcap, dtype
    (2, 2, 64, 64, 0, 0.0, torch.float32),
    (4, 1, 32, 32, 50, 0.0, torch.float32),
    (7, 1, 20, 12, 0, 8.0, torch.float32),
    (4, 2, 128, 96, 70, 3.0, torch.float32),
    (16, 8, 8, 8, 0, 0.0, torch.float32),
    (4, 2, 20, 24, 70, 0.0, torch.float64),
]


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_schedule(shape):
    hq, hkv, d, dv, window, softcap, dtype = shape
    rng = random.Random(repr(shape))
    lengths = [70, 1, 135]
    plan, rows = packed(lengths)
    q, k, v = make(rows, hq, hkv, d, dv, dtype)
    expected = attention(q, k, v, *plan, None, 0, 0.2, window, softcap)
    assert error(expected[0], dense(*(x.double() for x in (q, k, v)), plan, 0.2, window, softcap)[0]) < 3e-6
    one_by_one = [[(s, 1) for s, n in enumerate(lengths) if i < n] for i in range(max(lengths))]
    threads = torch.get_num_threads()
    try:
        for i, block_size in enumerate((4, 16, 48)):
            torch.set_num_threads(1 + i % 2)
            schedules = [one_by_one] if i == 1 else []
            schedules += [random_chunks(lengths, largest, rng) for largest in (5, 100)]
            for chunks in schedules:
                for actual, want in zip(
                    run_in_pages(q, k, v, lengths, chunks, block_size, window, softcap, rng), expected
                ):
                    assert torch.equal(actual, want)
            for actual, want in zip(attention(q, k, v, *plan, None, 0, 0.2, window, softcap), expected):
                assert torch.equal(actual, want)
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_bits_do_not_depend_on_neighbours():
    """A sequence alone, and among others that hold infinities."""
    q, k, v = make(300, 4, 2, 48, 48, torch.float32)
    alone = attention(q[100:190], k[100:190], v[100:190], *packed([90])[0])[0]
    k[190:], v[:100] = torch.inf, torch.nan
    among = attention(q, k, v, *packed([100, 90, 110])[0])[0]
    assert torch.equal(among[100:190], alone)


@needs_native
def test_later_keys_are_not_read():
    """NaN in the keys after a row leaves the row and its gradient alone."""
    plan, rows = packed([150])
    q, k, v = make(rows, 2, 2, 24, 24, torch.float32)
    clean = attention(q, k, v, *plan)
    k[97:], v[97:] = torch.nan, torch.inf
    out, lse = attention(q, k, v, *plan)
    assert torch.equal(out[:97], clean[0][:97])
    assert torch.equal(lse[:97], clean[1][:97])
    assert not out[97:].isfinite().any()
    grads = [attention_backward(torch.ones_like(out), q, k, v, *x, *plan, 0.2)[0][:97] for x in (clean, (out, lse))]
    assert grads[1].isfinite().all()
    window = attention(q, k.flip(0), v.flip(0), *plan, None, 0, 0.2, 20)[0]
    assert window[53 + 19 :].isfinite().all()
    assert not window[53 + 18].isfinite().any()


@needs_native
@pytest.mark.parametrize(("hq", "hkv", "lengths"), [(4, 2, [100, 17, 130]), (6, 1, [300])])
def test_gradient_bits_do_not_depend_on_threads(hq, hkv, lengths):
    plan, rows = packed(lengths)
    q, k, v = make(rows, hq, hkv, 32, 32, torch.float32)
    grad = torch.randn(rows, hq, 32)
    out, lse = attention(q, k, v, *plan)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(attention_backward(grad, q, k, v, out, lse, *plan, 0.2, 40))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0]))


@needs_native
def test_strided_inputs():
    """Views of a fused projection, of transposed heads, and of a strided last dimension."""
    plan, rows = packed([40, 31])
    fused = torch.randn(rows, 8 * 32)
    q, k, v = (
        fused[:, : 4 * 32].view(rows, 4, 32),
        fused[:, 128:192].view(rows, 2, 32),
        fused[:, 192:].view(rows, 2, 32),
    )
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), *plan)
    head_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    last_strided = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]
    grad = torch.randn(rows, 32, 4).transpose(1, 2)
    grads = attention_backward(grad.contiguous(), q, k, v, *expected, *plan, 0.2)
    for views in ((q, k, v), head_first, last_strided):
        actual = attention(*views, *plan)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])
        for a, b in zip(attention_backward(grad, *views, *actual, *plan, 0.2), grads):
            assert torch.equal(a, b)


# The Triton launchers: their tiles, splits and limits.
launch_attention = torch.ops.toolkit.attention


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "v_dim", "page"),
    [
        (1, 1, 16, 16, 16),
        (4, 2, 20, 20, 7),
        (7, 1, 64, 40, 3),
        (34, 1, 16, 5, 4),
    ],
)
def test_matches_dense_oracle(heads, kv_heads, d, v_dim, page):
    lengths = [(5, 0), (1, 20), (17, 3), (0, 4)] if heads < 10 else [(2, 17), (0, 1), (1, 0)]
    Batch(1, lengths, heads, kv_heads, d, v_dim, page, padding=3).check(2e-5)


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("window", [1, 5, 33])
def test_window(window):
    Batch(2, [(20, 0), (3, 40), (1, 16)], 2, 1, 16).check(2e-5, window=window)


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap):
    Batch(3, [(19, 2), (1, 20)], 4, 2, 16).check(2e-5, softcap=softcap, window=11)


@only_triton
@pytest.mark.usefixtures("impl")
def test_half_precision():
    Batch(4, [(19, 2), (1, 20)], 4, 2, 32, dtype=torch.float16).check(2**-9)


@only_triton
@pytest.mark.usefixtures("impl")
def test_extreme_scores_of_triton():
    batch = Batch(5, [(20, 5)], 2, 2, 16)
    batch.q *= 1e3
    batch.check(1e-4)


@only_triton
@pytest.mark.usefixtures("impl")
def test_no_tokens_and_only_padding():
    empty = Batch(6, [(0, 3)], 2, 2, 16)
    out, lse = empty.paged()
    assert out.shape == (0, 2, 16)
    assert lse.shape == (0, 2)
    Batch(6, [(0, 3), (0, 1)], 2, 2, 16, padding=5).check(1e-5)


@only_triton
@pytest.mark.usefixtures("impl")
def test_strided_inputs_of_triton():
    batch = Batch(7, [(9, 4)], 4, 2, 16)
    want = batch.contiguous()
    fused = torch.cat([batch.k, batch.v], -1)  # k and v as views of one fused tensor
    batch.k, batch.v = fused[..., :16], fused[..., 16:]
    batch.q = batch.q.transpose(0, 1).contiguous().transpose(0, 1)
    got = batch.contiguous()
    assert torch.equal(want[0], got[0])
    assert torch.equal(want[1], got[1])


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (7, 20.0)])
def test_chunks_decode_and_neighbours_keep_the_bits(window, softcap, monkeypatch):
    whole = Batch(8, [(23, 0)], 6, 2, 24)
    out, lse = whole.contiguous(window, softcap)
    rng = random.Random(9)
    for trial in range(1 + (window == 0)):
        cuts = sorted({0, 23, *rng.sample(range(1, 23), 3), 21, 22})
        for begin, end in itertools.pairwise(cuts):
            before, after = rng.randrange(0, 4), rng.randrange(0, 4)
            noise = Batch(100 + trial, [(before, 2), (after, 5)], 6, 2, 24)
            rows = noise.k.shape[0]
            q = torch.cat([noise.q[:before], whole.q[begin:end], noise.q[before:]])
            got = launch_attention(
                q, torch.cat([noise.k, whole.k]), torch.cat([noise.v, whole.v]),
                torch.tensor([0, before, before + end - begin, before + end - begin + after]),
                torch.tensor([noise.kv_offsets[0], rows + whole.kv_offsets[0], noise.kv_offsets[1]]),
                torch.tensor([noise.kv[0], end, noise.kv[1]]), None, 0, whole.scale, window, softcap,
            )  # fmt: skip
            assert torch.equal(got[0][before : before + end - begin], out[begin:end])
            assert torch.equal(got[1][before : before + end - begin], lse[begin:end])


@only_triton
@pytest.mark.usefixtures("impl")
def test_bad_input_is_one_sentence():
    batch = Batch(10, [(2, 0)], 3, 1, 16)
    with pytest.raises(ToolkitError, match="dtypes"):
        launch_attention(
            batch.q.half(),
            batch.k,
            batch.v,
            batch.offsets,
            batch.kv_offsets,
            batch.kv_lengths,
            None,
            0,
            1.0,
            0,
            0.0,
        )
    with pytest.raises(ToolkitError, match="dtype must be float32 or float16 in Triton's interpreter"):
        Batch(10, [(2, 0)], 3, 1, 16, dtype=torch.bfloat16).contiguous()
    batch = Batch(10, [(2, 0)], 3, 1, 600, 64)
    with pytest.raises(ToolkitError, match="head_dim must be <= 576 in the Triton kernels of attention, got 600"):
        batch.contiguous()
    with pytest.raises(ToolkitError, match="multiple of Hkv"):
        launch_attention(batch.q, batch.k.repeat(1, 2, 1), batch.v.repeat(1, 2, 1), batch.offsets, batch.kv_offsets,
                  batch.kv_lengths, None, 0, 1.0, 0, 0.0)  # fmt: skip


# The Triton launchers: their tiles, splits and limits.
launch_attention = torch.ops.toolkit.attention
launch_attention_backward = torch.ops.toolkit.attention_backward


def dense_of_triton_backward(q, k, v, offsets, kv_offsets, kv_lengths, scale, window, softcap):
    parts = []
    for s, length in enumerate(kv_lengths.tolist()):
        rows = slice(int(kv_offsets[s]), int(kv_offsets[s]) + length)
        queries = q[offsets[s] : offsets[s + 1]]
        position = length - queries.shape[0] + torch.arange(queries.shape[0])[:, None]
        key = torch.arange(length)[None, :]
        hidden = (key > position) | ((key <= position - window) if window > 0 else False)
        keys, values = (x[rows].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("nhd,khd->hnk", queries, keys) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        parts.append(torch.einsum("hnk,khv->nhv", scores.masked_fill(hidden, -math.inf).softmax(-1), values))
    return torch.cat(parts)


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "v_dim", "window", "softcap"),
    [
        (1, 1, 16, 16, 0, 0.0),
        (6, 2, 20, 12, 0, 0.0),
        (4, 2, 16, 24, 7, 0.0),
        (2, 1, 8, 8, 20, 1.5),
        (18, 1, 8, 8, 0, 0.0),
    ],
)
def test_matches_autograd_through_dense_oracle(heads, kv_heads, d, v_dim, window, softcap):
    torch.manual_seed(heads * 100 + d)
    queries, past = [5, 1, 0, 18], [0, 17, 2, 1]
    if heads > 8:
        queries, past = [3, 0, 2, 1], [0, 1, 4, 0]
    lengths = [n + p for n, p in zip(queries, past)]
    offsets = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()])
    kv_lengths = torch.tensor(lengths)
    kv_offsets = torch.tensor([2 + sum(lengths[:i]) + 2 * i for i in range(4)])
    rows, tokens = sum(lengths) + 10, sum(queries)
    q, k, v = (
        torch.randn(tokens, heads, d),
        torch.randn(rows, kv_heads, d),
        torch.randn(rows, kv_heads, v_dim),
    )
    grad = torch.randn(tokens, heads, v_dim)
    scale = d**-0.5

    exact = [x.double().requires_grad_() for x in (q, k, v)]
    dense_of_triton_backward(*exact, offsets, kv_offsets, kv_lengths, scale, window, softcap).backward(grad.double())
    owned = torch.zeros(rows, dtype=torch.bool)
    for at, length in zip(kv_offsets.tolist(), lengths):
        owned[at : at + length] = True
    k[~owned], v[~owned] = math.nan, math.nan
    out, lse = launch_attention(q, k, v, offsets, kv_offsets, kv_lengths, None, 0, scale, window, softcap)
    got = launch_attention_backward(grad, q, k, v, out, lse, offsets, kv_offsets, kv_lengths, scale, window, softcap)
    for value, expected in zip(got, exact):
        assert expected.grad is not None
        torch.testing.assert_close(value.double(), expected.grad, rtol=3e-5, atol=3e-5)
    assert (got[1][~owned] == 0).all()
    assert (got[2][~owned] == 0).all()


@only_triton
@pytest.mark.usefixtures("impl")
def test_padding_rows_and_strided_gradients():
    torch.manual_seed(0)
    q, k, v = torch.randn(9, 2, 16), torch.randn(6, 2, 16), torch.randn(6, 2, 16)
    offsets, kv_offsets, kv_lengths = torch.tensor([0, 6]), torch.tensor([0]), torch.tensor([6])
    out, lse = launch_attention(q, k, v, offsets, kv_offsets, kv_lengths, None, 0, 0.25, 0, 0.0)
    grad = torch.randn(9, 16, 2).transpose(1, 2)
    dq, dk, dv, _ = launch_attention_backward(grad, q, k, v, out, lse, offsets, kv_offsets, kv_lengths, 0.25, 0, 0.0)
    short = (grad[:6].contiguous(), q[:6], k, v, out[:6], lse[:6])
    again = launch_attention_backward(*short, offsets, kv_offsets, kv_lengths, 0.25, 0, 0.0)
    assert (dq[6:] == 0).all()
    for value, expected in zip((dq[:6], dk, dv), again):
        assert torch.equal(value, expected)


@only_triton
@pytest.mark.usefixtures("impl")
def test_no_queries():
    empty = torch.empty(0, 2, 16)
    k = torch.randn(3, 2, 16)
    args = torch.tensor([0, 0]), torch.tensor([0]), torch.tensor([3])
    dq, dk, dv, _ = launch_attention_backward(empty, empty, k, k, empty, torch.empty(0, 2), *args, 0.25, 0, 0.0)
    assert dq.shape == (0, 2, 16)
    assert (dk == 0).all()
    assert (dv == 0).all()


@only_triton
@pytest.mark.usefixtures("impl")
def test_sequences_that_share_rows():
    torch.manual_seed(1)
    q, k, v = torch.randn(7, 2, 8), torch.randn(21, 1, 8), torch.randn(21, 1, 8)
    args = torch.tensor([0, 3, 7]), torch.tensor([0, 2]), torch.tensor([18, 19])
    grad = torch.randn(7, 2, 8)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    dense_of_triton_backward(*exact, *args, 0.3, 0, 0.0).backward(grad.double())
    out, lse = launch_attention(q, k, v, *args, None, 0, 0.3, 0, 0.0)
    for value, expected in zip(launch_attention_backward(grad, q, k, v, out, lse, *args, 0.3, 0, 0.0), exact):
        assert expected.grad is not None
        torch.testing.assert_close(value.double(), expected.grad, rtol=3e-5, atol=3e-5)
