"""Rotary tables that depend on the length of the sequence: each sequence has its own, beside any others."""

import copy

import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

import toolkit
from tests.helpers.rope import BORDER, DYNAMIC, MODELS, longrope, rope_model, sequences, stock, stock_logprobs
from toolkit.errors import ToolkitError
from toolkit.numerics import Numerics
from toolkit.patching import ragged_forward, report_of
from toolkit.patching.roles import rotary
from toolkit.state import DenseContext, RaggedBatch, RotaryRegimes
from toolkit.state.active import set_forward_context
from toolkit.testing.models import random_model
from toolkit.training.long_sequence import backward_in_chunks


def gradients(model):
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences_have_stock_values_and_gradients(name):
    model = rope_model(name)
    oracle = stock(model)
    texts = sequences(20, BORDER, BORDER + 1, 90)
    texts += [texts[3][:25], texts[3][:50], texts[0] + texts[1]]  # prefixes shared by sequences on both sides
    expected = [stock_logprobs(oracle, text) for text in texts]
    torch.cat(expected).sum().backward()
    report = toolkit.patch(model)
    assert "rotary" not in {one.role for one in report.skipped}
    assert report.rotary_regimes() == (
        RotaryRegimes(varies_after=BORDER) if "dynamic" in name else RotaryRegimes((BORDER,))
    )
    alone = [toolkit.token_logprobs(model, [text])[0] for text in texts]
    together = toolkit.token_logprobs(model, texts)
    for got, one, exact in zip(together, alone, expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=3e-5)
        assert torch.equal(got, one)
    torch.cat(together).sum().backward()
    for key, exact in gradients(oracle).items():
        assert (gradients(model)[key] - exact).norm() <= 1e-4 * exact.norm().clamp_min(1e-3), key


@pytest.mark.parametrize("name", ["longrope", "longrope with a factor by length", "dynamic"])
def test_ordinary_calls_are_stock_calls(name):
    """By the longest row of the call; dynamic tables by the calls before, too."""
    model = rope_model(name)
    oracle = stock(model)
    toolkit.patch(model)
    with torch.no_grad():
        for length in (20, 100, 50, 20, BORDER, BORDER + 1):
            ids = torch.tensor(sequences(length, length))
            mask = torch.ones_like(ids)
            mask[1, : length // 2] = 0
            toolkit.token_logprobs(model, sequences(200))  # leaves no trace
            got, exact = (one(ids, attention_mask=mask).logits for one in (model, oracle))
            torch.testing.assert_close(got[mask.bool()], exact[mask.bool()], rtol=1e-4, atol=1e-4)


def test_tables_do_not_change_for_models_without_such_tables():
    assert toolkit.patch(random_model("llama")).rotary_regimes() is None
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": BORDER}
    assert toolkit.patch(random_model("llama", rope_parameters=yarn)).rotary_regimes() is None


def test_a_given_length_chooses_the_tables():
    model = rope_model("longrope")
    toolkit.patch(model)
    (text,) = sequences(20)
    short, long, same = (
        toolkit.token_logprobs(model, [text], rotary_lengths=[given])[0] for given in (None, BORDER + 1, BORDER)
    )
    assert torch.equal(short, same)
    assert (short - long).abs().max() > 1e-2
    forced = copy.deepcopy(model)
    toolkit.unpatch(forced)
    beside = torch.tensor([[*text, *sequences(50)[0]]])  # causal: what follows changes nothing but the tables
    logits = forced(beside).logits[0, :19].log_softmax(-1)
    torch.testing.assert_close(long, logits.gather(1, torch.tensor(text)[1:, None])[:, 0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ToolkitError, match=r"rotary_lengths\[0\] must be >= 33 for a sequence of 40 tokens, got 20"):
        toolkit.token_logprobs(model, sequences(40), rotary_lengths=[20])


def test_prefixes_are_shared_only_by_sequences_with_the_same_tables():
    (text,) = sequences(60)
    texts = [text[:30], text[:28], text[:50], text]
    lengths = [RotaryRegimes((BORDER,)).canonical(len(one)) for one in texts]
    assert lengths == [1, 1, BORDER + 1, BORDER + 1]
    batch = RaggedBatch.from_sequences(texts, rotary_lengths=lengths)
    assert len(batch.tokens) == 30 + 60 < sum(map(len, texts))
    assert batch.tokens[batch.sample_rows].tolist() == [token for one in texts for token in one]
    assert batch.rotary_lengths.tolist() == [1] * 30 + [BORDER + 1] * 60
    assert torch.equal(RotaryRegimes((BORDER,)).of_batch(batch), batch.rotary_lengths)
    with pytest.raises(ToolkitError, match="rotary_lengths must have one entry per sequence"):
        RaggedBatch.from_sequences(texts, rotary_lengths=[1])
    model = rope_model("longrope")
    toolkit.patch(model)
    torch.testing.assert_close(
        ragged_forward(model, RaggedBatch.from_sequences(texts, share=False)),
        ragged_forward(model, batch)[batch.sample_rows],
        rtol=0, atol=0,
    )  # fmt: skip
    with pytest.raises(ToolkitError, match="must share prefixes only where their lengths have the same rotary tables"):
        ragged_forward(model, RaggedBatch.from_sequences(texts))


def test_routing_and_rotary_lengths_together():
    (text,) = sequences(40)
    texts, lengths = [text[:30], text[:30], text], [1, 1, 33]
    routing = [torch.arange(len(one))[:, None, None].expand(-1, 2, 3) for one in texts]
    batch = RaggedBatch.from_sequences(texts, routing=routing, rotary_lengths=lengths)
    assert len(batch.tokens) == 70
    assert batch.tokens[batch.sample_rows].tolist() == [token for one in texts for token in one]
    assert batch.rotary_lengths.tolist() == [1] * 30 + [33] * 40
    assert batch.routing[1, :, 2].tolist() == [*range(30), *range(40)]


@pytest.mark.parametrize("roles", [["attention", "layer"], None])
def test_tables_that_are_not_patched_are_refused_in_a_ragged_batch(roles):
    model = rope_model("longrope")
    rotary = model.model.rotary_emb
    if roles is None:  # tables that no candidate explains

        class Odd(type(rotary)):
            def forward(self, x, position_ids):
                cos, sin = super().forward(x, position_ids)
                return cos, sin + position_ids[..., None] * 1e-3

        rotary.__class__ = Odd
    report = toolkit.patch(model, roles)
    assert report.rotary_regimes() is None
    with pytest.raises(
        ToolkitError, match=r"rotary_emb of Phi3ForCausalLM makes rotary tables by the longest sequence"
    ):
        toolkit.token_logprobs(model, sequences(5, 6))


def test_chunks_of_a_long_sequence_have_its_tables():
    model = rope_model("longrope")
    toolkit.patch(model)
    (text,) = sequences(70)
    (-toolkit.token_logprobs(model, [text])[0].mean()).backward()
    expected = {name: one.clone() for name, one in gradients(model).items()}
    model.zero_grad()
    backward_in_chunks(model, text, chunk_tokens=16)
    for name, exact in expected.items():
        assert (gradients(model)[name] - exact).norm() <= 1e-4 * exact.norm().clamp_min(1e-3), name


def test_copies_and_other_dtypes_keep_their_own_tables():
    model = rope_model("longrope")
    oracle = stock(model).to(torch.bfloat16)
    toolkit.patch(model)
    copied = copy.deepcopy(model).to(torch.bfloat16)  # casts the frequencies, too
    assert report_of(copied) is not None
    texts = sequences(20, 60)
    with torch.no_grad():
        for got, text in zip(toolkit.token_logprobs(copied, texts), texts, strict=True):
            assert (got - stock_logprobs(oracle, text)).abs().mean() < 0.05
        again = toolkit.token_logprobs(model, texts)
    toolkit.unpatch(model)
    for got, text in zip(again, texts, strict=True):
        torch.testing.assert_close(got, stock_logprobs(model, text), rtol=1e-4, atol=3e-5)


def test_a_compiled_forward_has_the_tables_of_each_sequence():
    model = rope_model("longrope")
    toolkit.patch(model)
    batch = RaggedBatch.from_sequences(sequences(20, 50))
    expected = ragged_forward(model, batch)
    compiled = torch.compile(lambda: ragged_forward(model, batch), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rope", [DYNAMIC, longrope(8)])
def test_tables_along_axes_are_those_of_each_sequence(rope):
    config = Qwen2_5_VLTextConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=BORDER, vocab_size=100,
        rope_parameters={**rope, "mrope_section": [2, 3, 3]},
    )  # fmt: skip
    module = Qwen2_5_VLRotaryEmbedding(config)
    (claim,) = rotary.find(module, Numerics.BITWISE)
    assert claim.op == "rotary_tables along axes by sequence length"
    claim.install()
    x, parts = torch.zeros(1, 1, 8), []
    for length in (50, 10):
        steps = torch.arange(length)
        parts.append(torch.stack([steps, steps // 2, steps // 3])[:, None])
    with set_forward_context(DenseContext(RaggedBatch.from_sequences([[0] * 50, [0] * 10], share=False))):
        together = module(x, torch.cat(parts, -1))
    apart = [Qwen2_5_VLRotaryEmbedding(config)(x, part) for part in parts]
    for got, one, other in zip(together, *apart, strict=True):
        torch.testing.assert_close(got, torch.cat([one, other], 1), rtol=1e-6, atol=1e-6)
