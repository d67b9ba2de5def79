"""attention against dense float64 attention: values and every gradient, over every implementation."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.attention import Batch, dense, make, offsets, packed
from tests.helpers.implementations import (
    NATIVE,
    REFERENCE,
    SMALL,
    TRITON,
    impl_and,
    impl_and_dtype,
    impl_dtype_and,
    only_interpreter,
    only_triton,
)
from tests.helpers.prefix_trees import error
from tests.helpers.rowwise import seeded
from toolkit.errors import ToolkitError
from toolkit.ops.attention import attention, attention_backward

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
CASES = [  # D, Dv, Hq, Hkv, window, softcap
    (32, 32, 4, 4, 0, 0.0),
    (40, 24, 4, 2, 7, 0.0),
    (20, 20, 4, 1, 0, 5.0),
    (64, 64, 7, 1, 64, 0.0),
    (96, 64, 2, 1, 0, 0.0),
    (128, 128, 2, 1, 100, 30.0),
    (256, 256, 1, 1, 1, 0.0),
    (5, 3, 3, 3, 0, 0.0),
    (16, 5, 34, 1, 11, 0.0),
]


@impl_dtype_and("case", CASES, [CASES[i] for i in (1, 2, 5, 7)])
def test_forward_and_gradients(impl, dtype, case):
    """Keys that no sequence has, between sequences, are NaN."""
    d, dv, hq, hkv, window, softcap = case
    sequences = [(17, 0), (0, 5), (130, 0), (1, 17)]  # queries, and keys before them
    if SMALL and impl is TRITON:
        sequences = [(2, 2), (0, 3), (1, 17)] if hq > 4 else [(3, 2), (0, 3), (10, 0), (1, 17)]
    batch = Batch(1, sequences, hq, hkv, d, dv, dtype=dtype, padding=3)
    plan, scale = (batch.offsets, batch.kv_offsets, batch.kv_lengths), 1.7 * d**-0.5
    unread = batch.k[:, 0, 0].isnan()
    upcast = [x.double().nan_to_num(0.0).requires_grad_() for x in (batch.q, batch.k, batch.v)]
    expected, expected_lse = dense(*upcast, plan, scale, window, softcap)
    grad = seeded(*expected.shape, dtype=dtype, seed=9)
    expected_grads = torch.autograd.grad(expected, upcast, grad.double())
    out, lse = attention(batch.q, batch.k, batch.v, *plan, None, 0, scale, window, softcap)
    grads = attention_backward(grad, batch.q, batch.k, batch.v, out, lse, *plan, scale, window, softcap)
    assert out.dtype == dtype
    assert error(out, expected) < TOLERANCE[dtype]
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    near = 2 * TOLERANCE[torch.float32] if dtype != torch.float64 else TOLERANCE[dtype]
    assert error(lse.nan_to_num(0, 0, 0), expected_lse.nan_to_num(0, 0, 0)) < near
    assert (out[-3:] == 0).all()
    for name, actual, want in zip(("dq", "dk", "dv"), grads, expected_grads):
        assert actual.is_contiguous()
        assert error(actual, want) < (1e-10 if dtype == torch.float64 else 4 * TOLERANCE[dtype]), name
    assert not grads[0][-3:].any()
    for x in grads[1:3]:
        assert (x[unread] == 0).all()


PAGED = [  # heads, kv_heads, d, v_dim, page, options
    (1, 1, 16, 16, 16, {}),
    (4, 2, 20, 20, 7, {"window": 11, "softcap": 0.5}),
    (7, 1, 64, 40, 3, {"window": 1}),
    (34, 1, 16, 5, 4, {"softcap": 30.0}),
]


@impl_dtype_and("heads, kv_heads, d, v_dim, page, options", PAGED, PAGED[1::2])
def test_keys_in_blocks_and_in_one_run(impl, dtype, heads, kv_heads, d, v_dim, page, options):
    """Bitwise identical; slots that are not written hold NaN, and the tables' unused entries no block."""
    lengths = [(5, 0), (1, 20), (17, 3), (0, 4)] if heads < 10 else [(2, 17), (0, 1), (1, 0)]
    batch = Batch(1, lengths, heads, kv_heads, d, v_dim, page, dtype=dtype, padding=3)
    batch.check(2e-5 if dtype in (torch.float32, torch.float64) else 2 * TOLERANCE[dtype], **options)


def test_against_scaled_dot_product_attention(impl):
    plan, rows = packed([50])
    q, k, v = make(rows, 4, 2, 64, 64, impl.dtypes[0])
    out, _ = attention(q, k, v, *plan)
    heads = [x.double().transpose(0, 1) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(0, 1)
    assert error(out, expected) < TOLERANCE[impl.dtypes[0]]


@impl_and("window, softcap", [(0, 0.0), (30, 4.0)], [(30, 4.0)])
def test_more_keys_than_queries_and_fewer(impl, window, softcap):
    """Keys before the queries, in any order of rows, with unreferenced rows; and too few keys."""
    plan = offsets([3, 40, 5, 9]), torch.tensor([100, 3, 0, 90]), torch.tensor([150, 70, 2, 0])
    heads = (2, 1, 8, 8) if SMALL and impl is TRITON else (4, 2, 32, 16)
    q, k, v = make(57, *heads, impl.dtypes[0], kv_rows=260)
    upcast = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = dense(*upcast, plan, 0.3, window, softcap)
    grad = seeded(*expected.shape, seed=9)
    expected_grads = torch.autograd.grad(expected, upcast, grad.double())
    out, lse = attention(q, k, v, *plan, None, 0, 0.3, window, softcap)
    assert error(out, expected) < TOLERANCE[q.dtype]
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    assert lse[43:46].isinf().all()  # the first 3 of 5 queries over 2 keys see nothing
    grads = attention_backward(grad, q, k, v, out, lse, *plan, 0.3, window, softcap)
    for actual, want in zip(grads, expected_grads):
        assert error(actual, want) < 10 * TOLERANCE[q.dtype]
    assert (grads[1][73:100] == 0).all()
    assert (grads[2][250:] == 0).all()


def test_sequences_that_share_keys(impl):
    """A common prefix stored once: its gradient is the sum over the sequences."""
    n = 21 if SMALL and impl is TRITON else 70
    plan = offsets([n, n, 20]), torch.tensor([0, 0, 1]), torch.tensor([n, n, 20])
    q, k, v = make(2 * n + 20, 2, 1, 32, 32, impl.dtypes[0], kv_rows=n)
    upcast = [x.double().requires_grad_() for x in (q, k, v)]
    expected, _ = dense(*upcast, plan, 0.2)
    grad = seeded(*expected.shape, seed=9)
    out, lse = attention(q, k, v, *plan, None, 0, 0.2)
    grads = attention_backward(grad, q, k, v, out, lse, *plan, 0.2)
    for actual, want in zip(grads, torch.autograd.grad(expected, upcast, grad.double())):
        assert error(actual, want) < 10 * TOLERANCE[q.dtype]


def test_autograd(impl):
    plan, rows = packed([13, 30])
    tensors = [x.requires_grad_() for x in make(rows, 2, 1, 8, 4, impl.dtypes[0])]
    upcast = [x.detach().double().requires_grad_() for x in tensors]
    expected, _ = dense(*upcast, plan, 8**-0.5)
    for grad in (seeded(rows, 2, 4, seed=9), seeded(1, 1, 1).expand(rows, 2, 4)):
        out, lse = attention(*tensors, *plan)
        assert not lse.requires_grad
        wanted = torch.autograd.grad(expected, upcast, grad.double(), retain_graph=True)
        for actual, want in zip(torch.autograd.grad(out, tensors, grad), wanted):
            assert error(actual, want) < 10 * TOLERANCE[actual.dtype]


@impl_and_dtype([torch.bfloat16, torch.float16], [REFERENCE, NATIVE])
def test_half_types_are_computed_in_float(impl, dtype):
    plan, rows = packed([33, 70])
    q, k, v = make(rows, 4, 2, 32, 32, dtype)
    out, lse = attention(q, k, v, *plan)
    expected, expected_lse = attention(q.float(), k.float(), v.float(), *plan)
    assert torch.equal(out, expected.to(dtype))
    assert torch.equal(lse, expected_lse)
    grad = torch.randn(out.shape).to(dtype)
    grads = attention_backward(grad, q, k, v, out, lse, *plan, 32**-0.5)
    floats = (x.float() for x in (grad, q, k, v, out))
    upcast = attention_backward(*floats, lse, *plan, 32**-0.5)
    for actual, want in zip(grads, upcast):
        assert torch.equal(actual, want.to(dtype))


def test_no_tokens_and_only_padding(impl):
    none = torch.zeros(0, dtype=torch.int64)
    q, k, v = make(0, 2, 1, 8, 4, torch.float32, kv_rows=3)
    zero = torch.zeros(1, dtype=torch.int64)
    for plan in ((zero, none, none), (torch.cat([zero, zero]), zero, zero + 3)):
        out, lse = attention(q, k, v, *plan)
        assert (out.shape, lse.shape) == ((0, 2, 4), (0, 2))
        grads = attention_backward(out, q, k, v, out, lse, *plan, 1.0)
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape, (0,)]
        assert not any(g.any() for g in grads)
    Batch(6, [(0, 3), (0, 1)], 2, 2, 16, padding=5).check(1e-5)


def test_extreme_scores(impl):
    """Scores of +-1e4: the softmax is almost one-hot and stays finite."""
    plan, rows = packed([100])
    q, k, v = make(rows, 2, 2, 16, 16, torch.float32)
    q, k = q * 60, k * 60
    upcast = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = dense(*upcast, plan, 1.0)
    assert expected_lse.abs().max() > 1e4
    out, lse = attention(q, k, v, *plan, None, 0, 1.0)
    assert error(lse, expected_lse) < 1e-6
    assert error(out, expected) < 2e-2  # a score of 1e4 carries an error of 1e-3 in float32
    grad = seeded(*out.shape, dtype=out.dtype, seed=9)
    for x in attention_backward(grad, q, k, v, out, lse, *plan, 1.0):
        assert x.isfinite().all()


def test_strided_inputs(impl):
    """Views of a fused projection, of transposed heads, and of a strided last dimension."""
    plan, rows = packed([9, 13] if SMALL and impl is TRITON else [40, 31])
    fused = seeded(rows, 8 * 32, dtype=torch.float32)
    q, k, v = (
        fused[:, : 4 * 32].view(rows, 4, 32),
        fused[:, 128:192].view(rows, 2, 32),
        fused[:, 192:].view(rows, 2, 32),
    )
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), *plan)
    head_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    last_strided = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]
    grad = seeded(rows, 32, 4, dtype=torch.float32).transpose(1, 2)
    grads = attention_backward(grad.contiguous(), q, k, v, *expected, *plan, 0.2)
    for views in ((q, k, v), head_first, last_strided):
        actual = attention(*views, *plan)
        # torch chooses the order of the reference's sums by the strides.
        found = [*actual, *attention_backward(grad, *views, *actual, *plan, 0.2)]
        for a, b in zip(found, [*expected, *grads], strict=True):
            assert error(a, b) < 1e-6 if impl is REFERENCE else torch.equal(a, b)


# The Triton launcher: its limits.
@only_interpreter
@pytest.mark.usefixtures("impl")
def test_a_dtype_that_is_named():
    with pytest.raises(ToolkitError, match="dtype must be float32 or float16 in Triton's interpreter"):
        Batch(10, [(2, 0)], 3, 1, 16, dtype=torch.bfloat16).contiguous()


@only_triton
@pytest.mark.usefixtures("impl")
def test_bad_input_is_one_sentence():
    batch = Batch(10, [(2, 0)], 3, 1, 16)
    plan = batch.offsets, batch.kv_offsets, batch.kv_lengths
    with pytest.raises(ToolkitError, match="dtypes"):
        torch.ops.toolkit.attention(batch.q.half(), batch.k, batch.v, *plan, None, 0, 1.0, 0, 0.0)
    k, v = batch.k.repeat(1, 2, 1), batch.v.repeat(1, 2, 1)
    with pytest.raises(ToolkitError, match="multiple of Hkv"):
        torch.ops.toolkit.attention(batch.q, k, v, *plan, None, 0, 1.0, 0, 0.0)
    batch = Batch(10, [(2, 0)], 3, 1, 600, 64)
    with pytest.raises(ToolkitError, match="head_dim must be <= 576 in the Triton kernels of attention, got 600"):
        batch.contiguous()
