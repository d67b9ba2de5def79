"""Models whose attention takes the keys that an indexer selects: patched, trained, paged and replayed."""

import pytest
import torch

import toolkit
from toolkit.errors import ToolkitError
from toolkit.modules.index_observer import index_losses
from toolkit.patching.forward import context_forward, ragged_forward
from toolkit.patching.state_spec import state_spec
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext
from toolkit.testing.architectures import small_model

pytest.importorskip("transformers.models.hy_v4", reason="needs a transformers with HYV4")

INDEXER = ("wq_b", "wk", "k_norm", "weights_proj")


@pytest.fixture(scope="module")
def model():
    """Layers with an indexer and layers that take another one's selection; gates and sinks. 8 keys are selected."""
    built = small_model("hy_v4")
    toolkit.patch(built)
    assert {c.op.split(" (")[1] for c in toolkit.patch(built).claims if c.role == "attention"} == {
        "half rotary of the last columns)", "another layer's selection)",
    }  # fmt: skip
    return built


def tokens(*shape, seed=3):
    return torch.randint(5, 300, shape, generator=torch.Generator().manual_seed(seed))


def loss_and_gradient(model, **inputs):
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def test_ordinary_calls_are_those_of_the_unpatched_model(model):
    """Padding on the left, explicit masks, and a cache; loss and every gradient."""
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.int64)
    mask[1, :4] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    holes = torch.full((1, 1, 13, 13), torch.finfo(torch.float32).min).triu(1)
    holes[..., 5:, 3] = torch.finfo(torch.float32).min
    generation = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = []
    for patched in (True, False):
        (toolkit.patch if patched else toolkit.unpatch)(model)
        with torch.no_grad():
            explicit = model(input_ids=ids[:1], attention_mask=holes).logits
            written = model.generate(ids[:1], **generation)
        found.append([explicit, written, *loss_and_gradient(model, **given)])
    toolkit.patch(model)
    (explicit, written, loss, gradients), (own, own_written, own_loss, own_gradients) = found
    torch.testing.assert_close(explicit, own, rtol=1e-4, atol=1e-5)
    assert torch.equal(written, own_written)
    torch.testing.assert_close(loss, own_loss, rtol=1e-5, atol=0)
    assert gradients.keys() == own_gradients.keys()
    difference = sum((gradients[name] - own_gradients[name]).square().sum() for name in gradients).sqrt()
    assert difference < 1e-4 * sum(g.square().sum() for g in own_gradients.values()).sqrt()


def test_state(model):
    """Indexer keys beside latents; a layer that takes a selection has latents alone."""
    found = [(spec.layer, spec.kind) for spec in state_spec(model) if spec.kind != "routing"]
    states = [(0, "index"), (0, "latent"), (1, "index"), (1, "latent"), (2, "latent")]
    assert found == [*states, (0, "selection"), (1, "selection")]


def test_training_has_the_bits_of_decoding(model):
    """Prompts of several lengths, chunked, one a prefix of another, decoded beyond the keys that are selected."""
    prompts = [tokens(23).tolist(), tokens(5, seed=4).tolist(), tokens(23).tolist()[:17]]
    params = toolkit.SamplingParams(max_tokens=9, ignore_eos=True, logprobs=0)
    with toolkit.Engine(model, max_num_seqs=4, max_num_batched_tokens=8, block_size=4) as engine:
        outputs = engine.generate(prompts, params)
    sequences = [prompt + list(output.token_ids) for prompt, output in zip(prompts, outputs)]
    with torch.no_grad():
        trained = toolkit.token_logprobs(model, sequences, last=[9] * 3)
    for output, values in zip(outputs, trained):
        assert output.logprobs == values.tolist()


def test_a_selection_is_replayed(model):
    """The selection that a forward kept gives its logits bit for bit; another one gives others; prefixes are shared."""
    sequences = [tokens(19).tolist(), [*tokens(19).tolist()[:14], 7, 8]]
    with torch.no_grad():
        context = DenseContext(RaggedBatch.from_sequences(sequences, share=False))
        context.selections.keep = True
        logits = context_forward(model, context)
        kept = context.selections.kept()
        assert kept.shape == (2, 35, 8)
        given = [kept[:, :19].transpose(0, 1), kept[:, 19:].transpose(0, 1)[:-1]]
        shared = RaggedBatch.from_sequences(sequences, selection=given)
        assert len(shared.tokens) == 21
        again = context_forward(model, DenseContext(shared))[shared.sample_rows]
        assert torch.equal(again[:-1], logits[:-1])
        narrow = [torch.where(torch.arange(8) == 0, one, -1) for one in given]
        other = context_forward(model, DenseContext(RaggedBatch.from_sequences(sequences, selection=narrow)))
        assert not torch.equal(other[: len(logits)], logits[: len(other)])
        missing = [one[:, :1] for one in given]
        with pytest.raises(ToolkitError, match="selection must have each of the model's indexers, got 1"):
            context_forward(model, DenseContext(RaggedBatch.from_sequences(sequences, selection=missing)))


def test_indexers_learn_from_their_loss_alone(model):
    """Their loss reaches them and nothing else, the model's loss everything else; ragged and ordinary are equal."""
    ids = tokens(2, 13)
    _, gradients = loss_and_gradient(model, input_ids=ids)
    assert not [name for name in gradients if name.split(".")[-2] in INDEXER]
    with index_losses() as ragged:
        ragged_forward(model, RaggedBatch.from_sequences(list(ids), share=False))
    with index_losses() as ordinary:
        model(input_ids=ids, use_cache=False)
    assert ragged.layers.keys() == ordinary.layers.keys() == {0, 1}
    for layer, values in ragged.layers.items():
        assert values.shape == (26,)
        assert values[0].abs() < 1e-6  # one key
        torch.testing.assert_close(values, ordinary.layers[layer], rtol=1e-4, atol=1e-6)
    model.zero_grad()
    ragged.mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[-2] for name in reached} == set(INDEXER)
    model.zero_grad()


@pytest.mark.parametrize("ragged", [True, False])
def test_layers_that_run_again_have_the_same_loss(model, ragged):
    """Activation checkpointing changes no gradient and counts no layer twice; its reentrant form is an error."""
    ids = tokens(2, 13)

    def gradients():
        model.zero_grad()
        with index_losses() as losses:
            if ragged:
                loss = torch.cat(toolkit.token_logprobs(model, list(ids))).mean()
            else:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        assert {len(values) for values in losses.layers.values()} <= {26}
        (loss + losses.mean()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    try:
        wanted = gradients()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found = gradients()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        with pytest.raises(ToolkitError, match="losses of indexers must be computed with gradients"):
            gradients()
    finally:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        model.eval().zero_grad()


def test_several_forwards_are_one_mean(model):
    first, second = tokens(2, 13), tokens(1, 7, seed=5)
    with index_losses() as together:
        for ids in (first, second):
            model(input_ids=ids, use_cache=False)
    means = []
    for ids in (first, second):
        with index_losses() as alone:
            model(input_ids=ids, use_cache=False)
        means.append(alone.mean())
    torch.testing.assert_close(together.mean(), (26 * means[0] + 7 * means[1]) / 33, rtol=1e-5, atol=0)


def test_prefix_trees_weigh_the_loss_by_their_samples(model):
    sequences = [[*tokens(12).tolist(), last] for last in (7, 8, 9)]
    found = []
    for share in (True, False):
        with index_losses() as losses:
            batch = RaggedBatch.from_sequences(sequences, share=share)
            ragged_forward(model, batch)
        found.append(losses.mean().detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_an_indexer_of_another_form_is_skipped(monkeypatch):
    """Without the relu it selects other keys: the layer keeps its own attention, and a ragged batch is an error."""
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as module

    monkeypatch.setattr(module.F, "relu", torch.abs)
    built = small_model("deepseek_v32")
    report = toolkit.patch(built)
    reasons = {one.reason for one in report.skipped if one.role == "attention"}
    assert any("its indexer selects other keys than any known form" in reason for reason in reasons)
    with pytest.raises(ToolkitError, match="must be patched for a ragged batch"):
        toolkit.token_logprobs(built, [[5, 6, 7]])
