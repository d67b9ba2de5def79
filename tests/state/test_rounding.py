"""Keys and values in eight bits: the rounding against float64, and that every forward computes with the same values."""

import pytest
import torch

from toolkit.modules.attention import attend
from toolkit.ops.attention import attention
from toolkit.state.batch import RaggedBatch
from toolkit.state.context import AttentionSettings
from toolkit.state.dense import DenseContext
from toolkit.state.rounding import int8_codes, int8_values, rounded
from toolkit.training.long_sequence import ChunkedContext, ChunkedState

ROUNDS = AttentionSettings(0.3, kv_dtype="int8")


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_codes_are_those_of_the_definition(dtype: torch.dtype) -> None:
    x = rows(7, 3, 33, dtype=dtype) * torch.tensor([1e-3, 1.0, 50.0])[:, None].to(dtype)
    codes, scales = int8_codes(x)
    exact = x.double()
    largest = exact.abs().amax(-1, keepdim=True)
    assert (codes.shape, codes.dtype, scales.shape, scales.dtype) == (x.shape, torch.int8, (7, 3, 1), torch.float32)
    torch.testing.assert_close(scales.double(), largest / 127, rtol=2**-22, atol=0)
    # Half a step, and what float32 rounds before it.
    assert ((codes.double() * scales - exact).abs() <= scales * (0.5 + 127 * 2**-22)).all()
    assert (codes.abs().amax(-1) == 127).all()
    assert int8_values(codes, scales, dtype).dtype == dtype


def test_a_row_has_its_own_bits_in_any_batch_and_layout() -> None:
    x = rows(64, 4, 65)
    whole = rounded(x)
    for count in (1, 3, 17):
        assert torch.equal(rounded(x[5 : 5 + count]), whole[5 : 5 + count])
    assert torch.equal(rounded(x.transpose(0, 1)), whole.transpose(0, 1))
    assert torch.equal(rounded(x.repeat(1, 1, 2)[..., :65]), whole)
    assert rounded(x[:0]).shape == x[:0].shape


def test_extremes() -> None:
    x = torch.tensor([[0.0, -0.0], [3e38, 1.0], [1e-45, 0.0], [torch.inf, 1.0], [torch.nan, 1.0], [2.0, -1.0]])
    found = rounded(x)
    assert torch.equal(found[0].abs(), torch.zeros(2))
    assert found[1, 0] == pytest.approx(3e38, rel=1e-6)
    assert found[2].abs().max() <= 1e-45
    assert not found[3].isfinite().any()
    assert found[4].isnan().all()
    assert torch.equal(found[5], rounded(x[5:])[0])  # what is beside it has no part in it


def test_gradients_go_straight_through() -> None:
    x, grad = rows(5, 2, 8).requires_grad_(), rows(5, 2, 8, seed=1)
    rounded(x).backward(grad)
    assert torch.equal(x.grad, grad)


def test_every_forward_computes_with_what_pages_hold() -> None:
    texts = [[1] * 9, [2] * 14]
    q, k, v = (rows(23, heads, 16, seed=seed).requires_grad_() for heads, seed in ((4, 0), (2, 1), (2, 2)))
    grad = rows(23, 4, 16, seed=3)
    batch = RaggedBatch.from_sequences(texts)
    out = DenseContext(batch).attend(0, q, k, v, ROUNDS)
    found = torch.autograd.grad(out, (q, k, v), grad)
    kept = [int8_values(*int8_codes(x.detach()), x.dtype).requires_grad_() for x in (k, v)]
    expected, _ = attention(
        q, *kept, batch.query_offsets, batch.kv_offsets, batch.kv_lengths, batch.block_tables, 1, 0.3
    )
    assert torch.equal(out, expected)
    assert not torch.equal(out, DenseContext(batch).attend(0, q, k, v, AttentionSettings(0.3)))
    for one, other in zip(found, torch.autograd.grad(expected, (q, *kept), grad)):
        assert torch.equal(one, other)
    # An ordinary call, and one whose mask torch's attention takes.
    parts = [x[None, 9:] for x in (q, k, v)]
    assert torch.equal(attend(0, *parts, None, None, ROUNDS)[0], out[9:])
    mask = torch.ones(14, 14, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(attend(0, *parts, mask, None, ROUNDS)[0], out[9:])
    # A sequence in chunks.
    state, got = ChunkedState(14, torch.device("cpu")), []
    for chunk, start in enumerate((0, 8)):
        stop = min(14, start + 8)
        offsets, first, length = (torch.tensor(one) for one in ([0, stop - start], [0], [stop]))
        tokens, positions = torch.zeros(stop - start).long(), torch.arange(start, stop)
        context = ChunkedContext(RaggedBatch(tokens, positions, offsets, first, length), state, chunk, start)
        with torch.no_grad():
            got.append(context.attend(0, *(x[9 + start : 9 + stop] for x in (q, k, v)), ROUNDS))
    torch.testing.assert_close(torch.cat(got), out[9:])
