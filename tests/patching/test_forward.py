"""Ragged forwards: the training log-probabilities, the weight version, what layers remember."""

import pytest
import torch

import toolkit
from toolkit.errors import ToolkitError
from toolkit.ops.token_logprob import token_logprob
from toolkit.patching import ragged_forward, state_spec, weight_version
from toolkit.state import StateSpec
from toolkit.state.batch import RaggedBatch
from toolkit.testing.models import FAMILIES, HYBRIDS, random_model


def sequences(vocabulary, lengths, seed=3):
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (n,), generator=source).tolist() for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_token_logprobs_equal_the_unpatched_model(family):
    model = random_model(family)
    texts = sequences(model.config.vocab_size, [11, 2, 30])
    with torch.no_grad():
        expected = [
            model(torch.tensor([ids]))
            .logits[0, :-1]
            .double()
            .log_softmax(-1)
            .gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            for ids in texts
        ]
    toolkit.patch(model)
    for got, oracle in zip(toolkit.token_logprobs(model, texts), expected):
        assert got.requires_grad
        torch.testing.assert_close(got.double(), oracle, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_do_not_depend_on_batch_neighbours(family):
    model = random_model(family)
    toolkit.patch(model)
    texts = sequences(model.config.vocab_size, [40, 1, 7, 23, 5, 12, 2])
    alone = [toolkit.token_logprobs(model, [ids])[0] for ids in texts]
    for seed in range(4):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        together = toolkit.token_logprobs(model, [texts[i] for i in order])
        assert all(torch.equal(got, alone[i]) for got, i in zip(together, order))
    padded = torch.zeros(2, 40, dtype=torch.int64)
    padded[0], padded[1, 28:] = torch.tensor(texts[0]), torch.tensor(texts[5])
    mask = torch.ones_like(padded)
    mask[1, :28] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    ordinary = token_logprob(logits[1, 28:-1], torch.tensor(texts[5][1:]))[0]
    if family in (
        *HYBRIDS,
        "deepseek_v3",
        "deepseek_v3_moe",
    ):  # which go by latents and shared scans in ragged batches alone
        torch.testing.assert_close(ordinary, alone[5], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(ordinary, alone[5])


def test_keyword_dropping_models_are_served_by_the_context():
    model = random_model("llama")
    toolkit.patch(model)
    batch = RaggedBatch.from_sequences([[3, 4, 5], [6, 7]])
    expected = ragged_forward(model, batch)
    layers = model.model.layers
    original = type(layers[0]).forward

    class Dropping(type(layers[0])):
        def forward(self, hidden_states, ragged=None, **kwargs):
            return original(self, hidden_states, **kwargs)

    for layer in layers:
        layer.__class__ = Dropping
    assert torch.equal(ragged_forward(model, batch), expected)


def test_empty_and_single_token_sequences_have_no_logprobs():
    model = random_model("llama")
    toolkit.patch(model)
    assert [t.shape for t in toolkit.token_logprobs(model, [[5], []])] == [(0,), (0,)]
    assert [t.shape[0] for t in toolkit.token_logprobs(model, [[5], [4, 5], []])] == [0, 1, 0]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mamba2"])
def test_a_batch_without_predictions_still_has_gradients_and_they_are_0(family, share):
    """A micro-batch whose completions are all masked is a loss like any other, of which DDP waits for the gradients."""
    model = random_model(family)
    toolkit.patch(model)
    parts = toolkit.token_logprobs(model, [[3, 4, 5], [3, 4]], share=share, last=[0, 0])
    assert [part.shape for part in parts] == [(0,), (0,)]
    sum(part.sum() for part in parts).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_token_ids_outside_the_vocabulary_are_refused():
    model = random_model("llama")
    toolkit.patch(model)
    with pytest.raises(ToolkitError, match=r"sequence 1 .* 0 to 330"):
        toolkit.token_logprobs(model, [[5, 6], [4, 331]])


@pytest.mark.parametrize(
    "wrong", [[5, 6.5], torch.tensor([5.0]), torch.tensor([True]), [5, 2**64], [5, None], "ab", None, 5, [[5], [6]]]
)
def test_what_is_no_list_of_token_ids_is_refused(wrong):
    model = random_model("llama")
    toolkit.patch(model)
    with pytest.raises(ToolkitError, match=r"sequence 1 must be a list of token ids from 0 to 330"):
        toolkit.token_logprobs(model, [[5, 6], wrong])


@pytest.mark.parametrize("given", [[], [1, 1]])
@pytest.mark.parametrize("name", ["last", "rotary_lengths"])
def test_lists_without_one_entry_per_sequence_are_refused(name, given):
    model = random_model("llama")
    toolkit.patch(model)
    with pytest.raises(ToolkitError, match=rf"{name} must have one entry per sequence \(1\), got {len(given)}"):
        toolkit.token_logprobs(model, [[5, 6]], **{name: given})


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_token_ids_may_have_any_integer_type(kind):
    model = random_model("llama")
    toolkit.patch(model)
    (expected,) = toolkit.token_logprobs(model, [[5, 6, 7]])
    for given in (torch.tensor([5, 6, 7], dtype=kind), torch.tensor([5, 6, 7], dtype=kind).numpy()):
        assert torch.equal(toolkit.token_logprobs(model, [given])[0], expected)


def test_an_unpatched_model_is_refused():
    with pytest.raises(ToolkitError, match="not patched"):
        toolkit.token_logprobs(random_model("llama"), [[4, 5]])


def test_state_spec_reads_what_layers_bring():
    model = random_model("qwen3", layers=3)
    toolkit.patch(model)
    assert state_spec(model) == [StateSpec(layer, "full", ((2, 24), (2, 24))) for layer in range(3)]
    windowed = random_model("mistral")
    toolkit.patch(windowed)
    assert state_spec(windowed) == [StateSpec(at, "window", ((2, 16), (2, 16)), 4096) for at in range(2)]


def test_layers_that_share_a_state_are_refused():
    model = random_model("llama")
    toolkit.patch(model)
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(ToolkitError, match="separate states, got several of layer 0"):
        state_spec(model)


def test_weight_version_moves_with_every_write():
    model = random_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = [weight_version(model)]
    assert weight_version(model) == seen[0]
    model(torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])).loss.backward()
    assert weight_version(model) == seen[0]
    optimizer.step()
    seen.append(weight_version(model))
    model.load_state_dict(model.state_dict())
    seen.append(weight_version(model))
    model.lm_head.weight.data.copy_(torch.zeros_like(model.lm_head.weight))
    toolkit.weights_changed(model)
    seen.append(weight_version(model))
    assert len(set(seen)) == 4


def test_a_fused_optimizer_moves_the_weight_version():
    model = random_model("llama")
    toolkit.patch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    before = weight_version(model)
    model(torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])).loss.backward()
    assert weight_version(model) == before
    late = model(torch.tensor([[3, 4]])).logits
    optimizer.step()
    assert weight_version(model) != before
    with pytest.raises(ToolkitError, match="not read before the weights changed"):
        late.argmax(-1)
