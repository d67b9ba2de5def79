"""Layers whose tokens see those after them, in ragged batches: all of the sequence, or both sides of a window."""

import pytest
import torch
from torch import Tensor

import toolkit
from tests.helpers.pooling_models import ENCODERS, TOKENS, hidden_of, pooling_model, ragged_texts
from toolkit import Engine
from toolkit.errors import ToolkitError
from toolkit.modules.attention import attend
from toolkit.patching.forward import hidden_states
from toolkit.state import PagedContext, RaggedBatch
from toolkit.state.context import AttentionSettings
from toolkit.state.dense import DenseContext

LENGTHS = (7, 1, 12)
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def heads(count: int, seed: int = 0) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(count, size, 8, generator=source, dtype=torch.float64) for size in (4, 2, 2)]


def by_hand(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Of one sequence in float64: query i sees key j where |i - j| < window."""
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    at = torch.arange(len(q))
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.3
    far = (at[:, None] - at).abs() >= window if window else torch.zeros(len(q), len(q), dtype=torch.bool)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(far, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window", [0, 1, 3, 9, 50])
def test_every_sequence_of_a_batch_sees_itself_on_both_sides(window):
    q, k, v = heads(sum(LENGTHS))
    batch = RaggedBatch.from_sequences([[1] * n for n in LENGTHS], share=False)
    got = DenseContext(batch).attend_bidirectional(0, q, k, v, AttentionSettings(0.3, window))
    parts = zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True)
    torch.testing.assert_close(got, torch.cat([by_hand(*part, window) for part in parts]))


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("dropout", [0.0, 1e-30])  # with dropout the mask is dense
def test_an_ordinary_call_without_a_mask_has_the_same_windows(window, dropout):
    q, k, v = heads(9)
    one = [x[None] for x in (q, k, v)]
    got = attend(0, *one, None, None, AttentionSettings(0.3, window), dropout, causal=False)
    torch.testing.assert_close(got[0], by_hand(q, k, v, window))


def test_equal_sequences_are_one_and_common_prefixes_are_not():
    texts = [[3, 4, 5, 6], [3, 4, 5, 6], [3, 4, 5], [3, 4, 5, 6, 7]]
    spans = [[(0, len(text))] for text in texts]
    batch = RaggedBatch.from_sequences(texts, spans=spans)
    assert batch.sample_rows is not None
    assert len(batch.tokens) == 12
    q, k, v = heads(12)
    got = DenseContext(batch).attend_bidirectional(0, q, k, v, AttentionSettings(0.3, 3))
    for rows in batch.sample_rows.split([len(text) for text in texts]):
        torch.testing.assert_close(got[rows], by_hand(q[rows], k[rows], v[rows], 3))
    with pytest.raises(ToolkitError, match="must not share prefixes where tokens see those after them"):
        DenseContext(RaggedBatch.from_sequences(texts)).attend_bidirectional(0, q, k, v, AttentionSettings(0.3))


def test_rows_behind_the_last_sequence_are_zero():
    q, k, v = heads(9)
    offsets = torch.tensor([0, 6])
    batch = RaggedBatch(torch.zeros(9, dtype=torch.int64), torch.arange(9), offsets, offsets[:1], torch.tensor([6]))
    got = DenseContext(batch).attend_bidirectional(0, q, k, v, AttentionSettings(0.3, 2))
    torch.testing.assert_close(got[:6], by_hand(q[:6], k[:6], v[:6], 2))
    assert not got[6:].any()


def test_sequences_that_are_still_written_have_no_tokens_ahead():
    batch = RaggedBatch.from_sequences([[1] * 3])
    context = PagedContext.__new__(PagedContext)
    context.batch = batch
    with pytest.raises(ToolkitError, match="not served by PagedContext; run the sequence as a whole"):
        context.attend_bidirectional(0, *heads(3), AttentionSettings(0.3))


@pytest.mark.parametrize("family", ENCODERS)
def test_gradients_of_a_ragged_batch_are_those_of_its_sequences(family):
    plain, model = pooling_model(family), pooling_model(family)
    report = toolkit.patch(model)
    assert report.bidirectional
    texts = ragged_texts((12, 1, 30))[:3]
    hidden = hidden_states(model, DenseContext(RaggedBatch.from_sequences(texts, share=False)))
    hidden.square().sum().backward()
    outputs = [plain(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in texts]
    torch.testing.assert_close(hidden, torch.cat(outputs), **CLOSE)
    torch.cat(outputs).square().sum().backward()
    expected = {name: one.grad for name, one in plain.named_parameters() if one.grad is not None}
    # That of a key's bias is 0: it moves all scores of a query, and is a sum of roundings.
    rounding = 1e-6 * max(grad.norm() for grad in expected.values())
    for name, one in model.named_parameters():
        if name in expected:
            assert (one.grad - expected[name]).norm() < 1e-4 * expected[name].norm() + rounding, name


@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_ordinary_padded_calls_of_a_patched_encoder_are_right(family):
    plain, model = pooling_model(family), pooling_model(family)
    toolkit.patch(model)
    texts = ragged_texts((12, 5, 30))[:3]
    ids, mask = torch.zeros(3, 30, dtype=torch.int64), torch.zeros(3, 30, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
    got = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for row, text in enumerate(texts):
        torch.testing.assert_close(got[row, : len(text)], hidden_of(plain, text), **CLOSE)


def test_encoders_predict_no_next_token():
    model = pooling_model("bert", TOKENS)
    toolkit.patch(model)
    with pytest.raises(ToolkitError, match="must predict the next token of each token, got an encoder"):
        toolkit.token_logprobs(model, [[3, 4, 5]])
    with pytest.raises(ToolkitError, match="must predict the next token of each token, got an encoder"):
        Engine(model)
    headless = pooling_model("llama")
    toolkit.patch(headless)
    with pytest.raises(ToolkitError, match="must predict the next token of each token, got no logits"):
        toolkit.token_logprobs(headless, [[3, 4, 5]])
