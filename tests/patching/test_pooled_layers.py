"""Models whose attention takes keys that an indexer selects pool by pool (GLM-5.3, Qwen4): trained, paged, replayed."""

import pytest
import torch

import toolkit
from tests.helpers.ragged_training import check_against_unpatched
from toolkit.patching import indexers_of
from toolkit.patching.forward import context_forward
from toolkit.patching.state_spec import state_spec
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext
from toolkit.testing.architectures import CAUSAL, IMAGE_TEXT, small_model

pytest.importorskip("transformers.models.glm5_next", reason="needs a transformers with GLM-5.3")
pytest.importorskip("transformers.models.qwen4_exp", reason="needs a transformers with Qwen4")


def glm():
    """Layers of a recurrence, a layer with an indexer, and one that takes the same selection."""
    from transformers import Glm5NextForConditionalGeneration

    config = small_model("glm5_next", kind=IMAGE_TEXT).config
    text = {
        "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
        "indexer_types": ["full", "full", "shared"],
        "mlp_layer_types": ["dense"] * 3,
    }
    for name, value in text.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    model = Glm5NextForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "kpool" in name:
                parameter.normal_(0.0, 0.5)
    return model


MODELS = {"glm": glm, "qwen": lambda: small_model("qwen4_exp", kind=CAUSAL)}
OPS = {
    "glm": ["sparse attention (another layer's pools)", "sparse attention (gated pools)"],
    "qwen": ["sparse attention (mean pools)"],
}
POOLS = {"glm": 4, "qwen": 2}


@pytest.fixture(scope="module", params=sorted(MODELS))
def case(request):
    model = MODELS[request.param]()
    toolkit.patch(model)
    return request.param, model


def tokens(count, seed=3):
    return torch.randint(5, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_layers_are_proven(case):
    name, model = case
    report = toolkit.patch(model)
    text = [claim for claim in report.claims if claim.role == "attention"]
    assert sorted(claim.op for claim in text) == OPS[name]
    assert [row for row in report.skipped if row.role == "attention"] == []
    assert len(indexers_of(report)) == 1


def test_state(case):
    """What the indexer keeps lies beside what is attended; a recorded selection is as wide as it may get."""
    name, model = case
    found = {(spec.kind, spec.shapes) for spec in state_spec(model) if "index" in spec.kind or spec.kind == "selection"}
    width = 8 + POOLS[name] - 1
    kept = {"glm": 2 * 16, "qwen": 16 + 2 * 16}[name]
    assert found == {("pooled_index", ((1, kept),)), ("selection", ((1, width),))}


def test_ragged_batches_and_gradients_are_those_of_the_unpatched_model(case):
    """Sequences beyond the keys that are selected, a shared prefix: log-probabilities and every gradient."""
    _, model = case
    texts = [tokens(27), [*tokens(27)[:14], 9, 7, 5], tokens(1, seed=6) * 2]
    check_against_unpatched(model, texts, atol=5e-5)


def test_ordinary_calls_with_padding_are_those_of_the_unpatched_model(case):
    """Padding on the left, and a cache."""
    _, model = case
    ids, mask = torch.tensor([tokens(19), tokens(19, seed=5)]), torch.ones(2, 19, dtype=torch.int64)
    mask[1, :6] = 0
    generation = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = []
    for patched in (True, False):
        (toolkit.patch if patched else toolkit.unpatch)(model)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            found.append((logits[mask.bool()], model.generate(ids[:1], **generation)))
    toolkit.patch(model)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=2e-5)
    assert torch.equal(found[0][1], found[1][1])


def test_training_has_the_bits_of_decoding(case):
    """Prompts of several lengths, chunked, one a prefix of another; the engine's selection is replayed."""
    _, model = case
    prompts = [tokens(23), tokens(5, seed=4), tokens(23)[:17]]
    params = toolkit.SamplingParams(max_tokens=9, ignore_eos=True, logprobs=0)
    with toolkit.Engine(
        model, max_num_seqs=4, max_num_batched_tokens=8, block_size=4, enable_return_selected_keys=True
    ) as engine:
        outputs = engine.generate(prompts, params)
    assert [output.error for output in outputs] == [None] * 3
    sequences = [prompt + list(output.token_ids) for prompt, output in zip(prompts, outputs, strict=True)]
    with torch.no_grad():
        trained = toolkit.token_logprobs(model, sequences, last=[9] * 3)
        replayed = toolkit.token_logprobs(
            model, sequences, last=[9] * 3, selection=[output.selected_keys for output in outputs]
        )
    for output, values, again in zip(outputs, trained, replayed, strict=True):
        assert output.logprobs == values.tolist() == again.tolist()


def test_a_selection_is_attended(case):
    """A forward that is given its own selection is bitwise identical; with each token's last key alone it differs."""
    _, model = case
    with torch.no_grad():
        context = DenseContext(RaggedBatch.from_sequences([tokens(21)]))
        context.selections.keep = True
        logits = context_forward(model, context)
        kept = context.selections.kept().transpose(0, 1)
        again = context_forward(model, DenseContext(RaggedBatch.from_sequences([tokens(21)], selection=[kept])))
        assert torch.equal(again, logits)
        narrow = torch.where(kept == kept.amax(-1, keepdim=True), kept, -1)
        other = context_forward(model, DenseContext(RaggedBatch.from_sequences([tokens(21)], selection=[narrow])))
    assert not torch.equal(other, logits)
