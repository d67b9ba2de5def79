"""Attention is claimed layer by layer: what is not proven keeps its own, beside proven layers of its configuration."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaForQuestionAnswering

import toolkit
from toolkit.errors import ToolkitError
from toolkit.numerics import Numerics
from toolkit.patching import state_spec
from toolkit.patching.roles import attention as role
from toolkit.testing.models import random_model

IDS = torch.arange(3, 16)[None]


def logits(model, **more):
    with torch.no_grad():
        return model(IDS, **more).logits


def biased(layer):
    """A layer that adds distances to the mask it is handed: without one it does not know them."""

    class Biased(type(layer)):
        def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
            length = hidden_states.shape[1]
            at = torch.arange(length)
            causal = torch.zeros(length, length).masked_fill(at[:, None] < at, torch.finfo(torch.float32).min)
            if attention_mask is not None:
                causal = causal - 0.1 * (at[:, None] - at).abs()
            return super().forward(hidden_states, position_embeddings, causal[None, None], **kwargs)

    layer.__class__ = Biased


def test_a_layer_that_the_interface_changes_leaves_all_of_its_configuration_alone():
    """It is claimed by what it writes out, and so is the other one: neither goes through the interface."""
    model = random_model("llama", attn_implementation="eager")
    biased(model.model.layers[1].self_attn)
    expected = logits(model)
    report = toolkit.patch(model)
    assert not {"attention interface", "attention (fused, half rotary)"} & {claim.op for claim in report.claims}
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    wanted = expected[0, :-1].log_softmax(-1).gather(1, IDS[0, 1:, None])[:, 0]
    got = toolkit.token_logprobs(model, [IDS[0].tolist()])[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_layer_of_a_configuration_of_its_own_is_claimed_beside_one_that_is_not_proven():
    model = random_model("llama", attn_implementation="eager")
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(model.config)
    biased(attention)
    expected = logits(model)
    report = toolkit.patch(model)
    assert [claim.path for claim in report.claims if claim.role == "attention"] == ["model.layers.0.self_attn"]
    assert attention.config._attn_implementation == "eager"
    with pytest.raises(ToolkitError, match="a skipped layer: the interface changes it"):
        toolkit.token_logprobs(model, [[3, 4, 5]])
    toolkit.unpatch(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_layer_that_a_text_does_not_call_keeps_its_implementation(implementation, causal):
    """As cross-attention does, which has the configuration of the layers around it."""
    model = random_model("llama", attn_implementation=implementation)
    spare = copy.deepcopy(model.model.layers[0].self_attn)
    spare.config, spare.is_causal = model.config, causal
    model.spare = spare
    source = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 7, 64, generator=source)
    tables = model.model.rotary_emb(hidden, torch.arange(7)[None])
    at = torch.arange(7)
    visible = (at[:, None] >= at) | torch.tensor(not causal)
    padding = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).bool()
    explicit = visible & padding[:, None, None, :]
    additive = torch.zeros(explicit.shape).masked_fill(~explicit, torch.finfo(torch.float32).min)

    def run(mask):
        with torch.no_grad():
            return spare(hidden, tables, mask)[0]

    own = additive if implementation == "eager" else explicit
    expected = run(own), run(own[:1] if implementation == "eager" else None)
    toolkit.patch(model)
    assert model.config._attn_implementation == "toolkit"
    torch.testing.assert_close(run(explicit), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run(None), expected[1], rtol=1e-5, atol=1e-6)
    if causal:  # a padding mask, as causal layers are handed
        torch.testing.assert_close(run(padding), expected[0], rtol=1e-5, atol=1e-6)


def test_a_head_that_reads_rows_of_padding_is_right():
    """The span of an answer is a softmax over the places of a row, those of padding among them."""
    model = LlamaForQuestionAnswering(random_model("llama").config).eval()
    torch.nn.init.normal_(model.qa_outputs.weight, std=0.3)
    ids = torch.randint(3, 300, (2, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    spans = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    expected = model(ids, attention_mask=mask, **spans)
    report = toolkit.patch(model)
    assert not {"attention interface", "attention (fused, half rotary)"} & {claim.op for claim in report.claims}
    got = model(ids, attention_mask=mask, **spans)
    for name in ("loss", "start_logits", "end_logits"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5)


class Outer(nn.Module):
    """A layer of attention whose part calls the interface, and has no index, or a wrong one."""

    def __init__(self, inner, index=None):
        super().__init__()
        self.config, self.is_causal, self.layer_idx = inner.config, True, inner.layer_idx
        self.inner, self.turn = inner, nn.Linear(64, 64, bias=False)
        del inner.is_causal, inner.layer_idx
        if index is not None:
            inner.layer_idx = index

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        out, weights = self.inner(hidden_states, position_embeddings, attention_mask, **kwargs)
        return self.turn(out), weights


def with_parts(index=None):
    model = random_model("llama", attn_implementation="eager")
    for layer in model.model.layers:
        layer.self_attn = Outer(layer.self_attn, index)
    return model


def test_the_part_that_calls_the_interface_knows_the_layers_index():
    model = with_parts()
    toolkit.patch(model)
    assert [layer.self_attn.inner.layer_idx for layer in model.model.layers] == [0, 1]
    assert [spec.layer for spec in state_spec(model)] == [0, 1]
    toolkit.unpatch(model)
    assert not hasattr(model.model.layers[1].self_attn.inner, "layer_idx")


def test_a_part_of_another_index_is_refused():
    reasons = {one.path: one.reason for one in role.find(with_parts(index=0), Numerics.BITWISE)}
    assert "inner, which calls the attention interface, has layer_idx 0" in reasons["model.layers.1.self_attn"]


def test_layers_that_are_handed_different_masks_are_proven_apart():
    """Layers of equal settings; the model cuts the text into chunks for the second."""
    model = random_model("llama", attn_implementation="eager")
    layer = model.model.layers[1]

    class Chunked(type(layer)):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            at = torch.arange(hidden_states.shape[1])
            seen = (at[:, None] >= at) & (at[:, None] // 2 == at // 2)
            mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
            return super().forward(hidden_states, attention_mask=mask[None, None], **kwargs)

    layer.__class__ = Chunked
    reasons = {one.path: one.reason for one in role.find(model, Numerics.BITWISE)}
    assert "the interface changes it" in reasons["model.layers.1.self_attn"]
