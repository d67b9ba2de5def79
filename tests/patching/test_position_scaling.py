"""Attention whose queries are scaled by position: below and beyond the length after which the factor is not 1."""

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaAttention

import toolkit
from tests.helpers.rope import sequences, stock, stock_logprobs
from toolkit.errors import ToolkitError
from toolkit.testing.models import from_config, random_model
from toolkit.testing.parity import check_parity

COMMON = {
    "vocab_size": 331, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 32, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
}  # fmt: skip
MODELS = {
    # By position_ids; a fused forward would leave the factor out, which is 1 for the tokens of a probe.
    "ministral3": {"rope_parameters": YARN},
    # By a token's row plus the length of the cache, in layers without rotary embedding.
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "no_rope_layers": [1, 0],
        "layer_types": ["full_attention"] * 2, "attn_temperature_tuning": True, "floor_scale": 16, "attn_scale": 0.5,
    },
}  # fmt: skip


def model_of(name, **settings):
    return from_config(AutoConfig.for_model(name, **{**COMMON, **MODELS[name], **settings}))


@pytest.mark.parametrize("name", MODELS)
def test_packed_and_ordinary_values_are_those_of_stock(name):
    model = model_of(name)
    oracle = stock(model)
    toolkit.patch(model)
    texts = sequences(20, 100, 50, 70)
    texts.append(texts[1][:60] + texts[0])
    alone = [stock_logprobs(oracle, text) for text in texts]
    together = toolkit.token_logprobs(model, texts)
    for text, got, exact in zip(texts, together, alone, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=5e-5)
        torch.testing.assert_close(stock_logprobs(model, text), exact, rtol=1e-4, atol=5e-5)
    torch.cat(together).sum().backward()
    torch.cat(alone).sum().backward()
    exact = dict(oracle.named_parameters())
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad - exact[key].grad).norm() <= 1e-4 * exact[key].grad.norm().clamp_min(1e-3), key


@pytest.mark.parametrize("name", MODELS)
def test_no_token_differs_between_engine_and_training(name):
    parity = check_parity(model_of(name), sequences(*range(5, 95, 6)), min_tokens=300)
    assert parity.differing == 0


@pytest.mark.parametrize("name", MODELS)
def test_what_is_far_beyond_a_probe_is_seen(name):
    """The factor is 1 for thousands of tokens, as in the released models."""
    settings = {"rope_parameters": {**YARN, "original_max_position_embeddings": 16384}, "floor_scale": 8192}
    report = toolkit.patch(model_of(name, **{key: settings[key] for key in settings.keys() & MODELS[name].keys()}))
    ops = {claim.op for claim in report.claims if claim.role == "attention"} - {"attention interface"}
    assert ops == ({"attention (positions of its rows)"} if name == "llama4_text" else set())


def test_positions_from_a_cache_that_cannot_be_a_tensor_are_refused():
    class Counting(LlamaAttention):
        def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
            past = 0 if past_key_values is None else int(past_key_values.get_seq_length(self.layer_idx))
            return super().forward(hidden_states * (1 + past), position_embeddings, attention_mask, None, **kwargs)

    model = random_model("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = Counting
    report = toolkit.patch(model)
    reason = "it counts positions from its cache's length, and"
    assert any(one.role == "attention" and one.reason.startswith(reason) for one in report.skipped)
    with pytest.raises(ToolkitError, match=reason):
        toolkit.token_logprobs(model, sequences(5))
