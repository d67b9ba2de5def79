"""Sparse attention whose layers attend an earlier layer's latents (Mistral Large 4): patched, trained and paged."""

import pytest
import torch

import toolkit
from tests.helpers.ragged_training import check_against_unpatched
from toolkit.patching.state_spec import state_spec
from toolkit.testing.architectures import IMAGE_TEXT, small_model

pytest.importorskip("transformers.models.mistral_large4", reason="needs a transformers with Mistral Large 4")


@pytest.fixture(scope="module")
def config():
    """Layers with and without rotary embeddings, of each kind a later one that takes the latents of the first.

    One has an indexer, the others take the selection before them.
    """
    text = {
        "kv_source_layers": [0, 0, 0, 3, 3],
        "no_rope_layers": [1, 1, 1, 0, 0],
        "indexer_types": ["full", "shared", "full", "full", "shared"],
        "layer_types": ["indexed_attention"] * 5,
        "mlp_layer_types": ["dense"] * 5,
        "num_hidden_layers": 5,
    }
    found = small_model("mistral_large4", kind=IMAGE_TEXT).config
    for name, value in text.items():
        setattr(found.text_config, name, value)
    return found


@pytest.fixture(scope="module")
def model(config):
    from transformers import MistralLarge4ForConditionalGeneration

    torch.manual_seed(0)
    built = MistralLarge4ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, value in [*built.named_parameters(), *built.named_buffers()]:
            if "softmax_scaling" in name or name.endswith("alpha"):
                value.uniform_(-0.5, 0.5)
    toolkit.patch(built)
    return built


def tokens(count, seed=3):
    return torch.randint(5, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_every_layer_is_proven(model):
    found = toolkit.patch(model)
    ops = sorted(claim.op for claim in found.claims if claim.role == "attention")
    assert [row for row in found.skipped if row.role == "attention"] == []
    assert ops == [
        *["sparse attention (another layer's selection)"] * 2,
        *["sparse attention (interleaved rotary of the first columns)"] * 2,
        "sparse attention (without rotary)",
    ]


def test_a_layer_keeps_the_latents_that_it_takes(model):
    """A separate state, of the width of the latents: those without rotary have no rotated part."""
    found = [(one.layer, one.kind, one.shapes[0]) for one in state_spec(model) if one.kind == "latent"]
    assert found == [(layer, "latent", (1, 24 if layer < 3 else 16)) for layer in range(5)]


def test_ragged_batches_and_gradients_are_those_of_the_unpatched_model(model):
    """Two sequences beyond the keys that are selected: log-probabilities, and the gradient of every parameter."""
    texts = [tokens(21), tokens(13, seed=5)]
    check_against_unpatched(model, texts, atol=2e-5)


def test_training_has_the_bits_of_decoding(model):
    """Prompts of several lengths, chunked, one a prefix of another, decoded beyond the keys that are selected."""
    prompts = [tokens(23), tokens(5, seed=4), tokens(23)[:17]]
    params = toolkit.SamplingParams(max_tokens=9, ignore_eos=True, logprobs=0)
    with toolkit.Engine(model, max_num_seqs=4, max_num_batched_tokens=8, block_size=4) as engine:
        outputs = engine.generate(prompts, params)
    assert [output.error for output in outputs] == [None] * 3
    sequences = [prompt + list(output.token_ids) for prompt, output in zip(prompts, outputs, strict=True)]
    with torch.no_grad():
        trained = toolkit.token_logprobs(model, sequences, last=[9] * 3)
    for output, values in zip(outputs, trained, strict=True):
        assert output.logprobs == values.tolist()
