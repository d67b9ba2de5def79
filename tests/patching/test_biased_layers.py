"""Attention with biases by distance, sinks of each query and convolutions of keys and values (Inkling 2)."""

import pytest
import torch

import toolkit
from tests.helpers.ragged_training import check_against_unpatched
from toolkit.patching.state_spec import state_spec
from toolkit.testing.architectures import small_model

pytest.importorskip("transformers.models.inkling2", reason="needs a transformers with Inkling 2")

MORE = 13


@pytest.fixture(scope="module")
def model():
    """A layer with a window, and one of all keys, whose biases reach 6 tokens back and whose queries grow from 4 on."""
    found = small_model("inkling2_text", rel_extent=6, log_scaling_n_floor=4)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if any(part in name for part in ("rel_logits_proj", "sink_proj", "static_weight", "weight_proj")):
                parameter.normal_(0.0, 0.5)
    toolkit.patch(found)
    return found


def tokens(count, seed=3):
    return torch.randint(5, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_claims(model):
    report = toolkit.patch(model)
    ops = [claim.op for claim in report.claims if claim.role in ("attention", "mixer")]
    assert sorted(set(ops)) == ["attention (biases by distance)", "convolution", "dynamic convolution"]
    assert len(ops) == 2 + 6 + 2
    assert [one for one in report.skipped if one.role in ("attention", "mixer")] == []


def test_a_layer_has_a_state_of_each_convolution(model):
    found = [(spec.layer, spec.kind, spec.part) for spec in state_spec(model) if spec.kind != "routing"]
    parts = [(layer, "conv", part) for layer in (0, 1) for part in range(4)]
    assert sorted(found) == sorted([(0, "window", 0), (1, "full", 0), *parts])


def test_ragged_batches_and_gradients_are_those_of_the_unpatched_model(model):
    """Sequences beyond window and reach, a shared prefix: log-probabilities and every gradient."""
    texts = [tokens(27), [*tokens(27)[:14], 9, 7, 5], tokens(2, seed=6)]
    check_against_unpatched(model, texts, atol=5e-5)


def test_completions_are_those_of_generate_and_have_the_bits_of_training(model):
    """Prompts of several lengths, chunked, one a prefix of another; ordinary calls with padding beside them."""
    prompts = [tokens(23), tokens(5, seed=4), tokens(23)[:17]]
    ids, mask = torch.tensor([tokens(19), tokens(19, seed=5)]), torch.ones(2, 19, dtype=torch.int64)
    mask[1, :6] = 0
    found = []
    for patched in (False, True):
        (toolkit.patch if patched else toolkit.unpatch)(model)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        given = {"do_sample": False, "max_new_tokens": MORE, "min_new_tokens": MORE, "pad_token_id": 0}
        written = [model.generate(torch.tensor([one]), **given, eos_token_id=None)[0, len(one) :] for one in prompts]
        found.append((logits[mask.bool()], [one.tolist() for one in written]))
    (own, expected), (mine, again) = found
    torch.testing.assert_close(mine, own, rtol=1e-4, atol=2e-5)
    assert again == expected
    params = toolkit.SamplingParams(max_tokens=MORE, temperature=0.0, ignore_eos=True)
    with toolkit.Engine(model, max_num_seqs=4, max_num_batched_tokens=8, block_size=4) as engine:
        outputs = engine.generate(prompts, params)
    assert [list(output.token_ids) for output in outputs] == expected
    sequences = [prompt + list(output.token_ids) for prompt, output in zip(prompts, outputs, strict=True)]
    with torch.no_grad():
        trained = toolkit.token_logprobs(model, sequences, last=[MORE] * 3)
    for output, values in zip(outputs, trained, strict=True):
        assert output.logprobs == values.tolist()
