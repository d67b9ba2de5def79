"""Routers, rotary tables and attention of every form are proven with the module's own parameters and in 16 bits, too.

Each fault here is none for the random parameters of unit scale that a probe begins with.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import toolkit
from toolkit.testing.architectures import small_model
from toolkit.testing.models import random_model

OWN = "with its own parameters in training mode"


def reasons(model, role):
    return {one.reason for one in toolkit.patch(model).skipped if one.role == role}


class CappedRouter(MixtralTopKRouter):
    def forward(self, hidden_states):
        logits = F.linear(hidden_states, self.weight).clamp(max=12.0)
        weights, ids = logits.float().softmax(-1).topk(self.top_k)
        return logits, weights / weights.sum(-1, keepdim=True), ids


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_router_whose_logits_are_capped_at_its_own_scale(scale):
    model = random_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.__class__ = CappedRouter
            layer.mlp.gate.weight.normal_(0.0, scale * layer.mlp.gate.weight.shape[1] ** -0.5)
    found = reasons(model, "router")
    assert all(OWN in reason for reason in found)
    assert bool(found) == (scale > 1.0)


def test_a_router_whose_experts_all_have_equal_scores():
    """A router of zeros, as some are made: torch's topk takes any of equal scores."""
    model = random_model("mixtral")
    for layer in model.model.layers:
        nn.init.zeros_(layer.mlp.gate.weight)
    assert reasons(model, "router") == set()


class ScaledByItsWeights(BloomAttention):
    """A factor of the scores that a probe would read from random weights, and training changes."""

    inv_norm_factor = property(lambda self: float(self.dense.weight.detach().square().mean()))


def test_attention_whose_factor_comes_from_its_weights():
    model = small_model("bloom")
    for layer in model.transformer.h:
        del layer.self_attention.inv_norm_factor
        layer.self_attention.__class__ = ScaledByItsWeights
    (reason,) = reasons(model, "attention")
    assert reason.endswith(OWN)


def turning(module, name):
    """A class whose forward turns its hidden states round where one of its weights is large."""

    class Turning(module):
        @functools.wraps(module.forward)
        def forward(self, hidden_states, *args, **kwargs):
            large = bool(self.get_parameter(name).abs().max() > 20.0)
            return module.forward(self, hidden_states.flip(-1) if large else hidden_states, *args, **kwargs)

    return Turning


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_ragged_batch_by_latents(scale):
    model = random_model("deepseek_v3")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.__class__ = turning(type(layer.self_attn), "kv_a_layernorm.weight")
            layer.self_attn.kv_a_layernorm.weight.mul_(scale)
    ops = {claim.op for claim in toolkit.patch(model).claims if claim.role == "attention"}
    assert any("latent" in op for op in ops) == (scale == 1.0)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_an_indexer_that_selects_otherwise_at_its_own_scale(scale):
    model = small_model("deepseek_v32")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.indexer.__class__ = turning(type(layer.self_attn.indexer), "wk.weight")
            layer.self_attn.indexer.wk.weight.mul_(scale)
    found = reasons(model, "attention")
    assert any("selects other keys" in reason for reason in found) == bool(found) == (scale > 1.0)


@pytest.mark.parametrize("family", ["olmo2", "ernie4_5"])
def test_rotary_tables_that_are_float32_beside_16_bits(family):
    model = small_model(family).to(torch.bfloat16)
    x, positions = torch.zeros(1, 9, 8, dtype=torch.bfloat16), torch.arange(4000, 4009)[None]
    expected = model.model.rotary_emb(x, positions)
    report = toolkit.patch(model)
    got = model.model.rotary_emb(x, positions)
    assert [claim.op for claim in report.claims if claim.role == "rotary"] == ["rotary_tables in float32"]
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
