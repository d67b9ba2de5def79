"""Engines whose blocks hold keys and values in eight bits: training computes with the same values, bit by bit."""

import copy
import pickle

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import toolkit
from tests.test_parity import prompts_for
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model
from toolkit.testing.parity import check_parity

PARAMS = toolkit.SamplingParams(max_tokens=12, seed=1, ignore_eos=True)


@pytest.mark.parametrize(
    ("family", "tokens"),
    [
        ("llama", 100),
        *(pytest.param(one, 1000, marks=pytest.mark.sweep) for one in ("llama", "gemma2", "qwen3_moe", "qwen3_next")),
        pytest.param("gpt_oss", 1000, marks=pytest.mark.sweep),
    ],
)
def test_no_token_differs_under_random_schedules(family, tokens):
    model = random_model(family)
    assert toolkit.patch(model, kv_cache_dtype="int8").kv_cache_dtype == "int8"
    parity = check_parity(model, prompts_for(model.config.vocab_size), min_tokens=tokens, seed=1)
    assert parity.tokens >= tokens
    assert parity.differing == parity.replayed_differing == 0
    assert parity.prefix_cache_hits > 0 or tokens < 1000
    assert parity.num_preemptions >= parity.num_swaps > 0 or tokens < 1000


def test_an_engine_patches_for_it_and_holds_fewer_bytes():
    settings = {"num_blocks": 16, "block_size": 4, "max_model_len": 64}
    model = random_model("llama")
    with toolkit.Engine(random_model("llama"), **settings) as engine:
        whole, plain = engine.pool.bytes, engine.generate([[5, 6, 7]], PARAMS)[0]
    with toolkit.Engine(model, kv_cache_dtype="int8", **settings) as engine:
        assert engine.pool.bytes == whole * (16 + 4) // (16 * 4)  # heads of 16: a byte each and a scale
        found = engine.generate([[5, 6, 7]], PARAMS)[0]
    assert found.logprobs != plain.logprobs
    (trained,) = toolkit.token_logprobs(model, [[5, 6, 7, *found.token_ids]], last=[12])
    assert torch.equal(torch.tensor(found.logprobs), trained.detach())
    assert toolkit.patch(model).kv_cache_dtype == "int8"  # as it is
    with toolkit.Engine(model, **settings) as engine:
        assert engine.generate([[5, 6, 7]], PARAMS)[0].logprobs == found.logprobs
    ids = torch.tensor([[5, 6, 7, *found.token_ids]])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        toolkit.patch(other)
        assert torch.equal(other(ids).logits, model(ids).logits)
    toolkit.patch(model, kv_cache_dtype="auto")
    with toolkit.Engine(model, **settings) as engine:
        assert engine.generate([[5, 6, 7]], PARAMS)[0].logprobs == plain.logprobs


def rounding_attention(module, query, key, value, attention_mask, **kwargs):
    """transformers' own attention, of keys and values that the definition in float64 rounds."""

    def kept(x):
        scale = x.detach().double().abs().amax(-1, keepdim=True) / 127
        return x + ((x.detach().double() / scale).round() * scale - x.detach()).to(x.dtype)

    return sdpa_attention_forward(module, query, kept(key), kept(value), attention_mask, **kwargs)


def test_ordinary_calls_and_stock_generation_round_alike():
    AttentionInterface.register("rounding", rounding_attention)
    AttentionMaskInterface.register("rounding", sdpa_mask)
    model, stock = random_model("llama"), random_model("llama")
    stock.set_attn_implementation("rounding")
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    plain = model(ids).logits
    toolkit.patch(model, kv_cache_dtype="int8")
    losses = [one(ids, labels=ids).loss for one in (model, stock)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(model.named_parameters(), stock.parameters()):
        torch.testing.assert_close(one.grad, other.grad, msg=name, atol=1e-5, rtol=1e-3)
    found = model(ids).logits
    torch.testing.assert_close(found, stock(ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-3)
    first = model(ids[:, :3], use_cache=True)
    torch.testing.assert_close(model(ids[:, 3:], past_key_values=first.past_key_values).logits[:, -1], found[:, -1])
    toolkit.unpatch(model)
    assert torch.equal(model(ids).logits, plain)


def test_what_cannot_be_held_so_is_refused():
    model = random_model("llama")
    with pytest.raises(ToolkitError, match="kv_cache_dtype must be one of auto, int8, got 'fp8'"):
        toolkit.patch(model, kv_cache_dtype="fp8")
    with pytest.raises(ToolkitError, match="kv_cache_dtype must be one of auto, int8, got 'fp8'"):
        toolkit.Engine(model, kv_cache_dtype="fp8")
    toolkit.patch(model)
    with pytest.raises(ToolkitError, match=r"call toolkit.patch\(model, kv_cache_dtype='int8'\) first"):
        toolkit.Engine(model, kv_cache_dtype="int8")
    recurrent = random_model("mamba2")
    with pytest.raises(ToolkitError, match="kv_cache_dtype must be 'auto' for Mamba2ForCausalLM, got 'int8'"):
        toolkit.patch(recurrent, kv_cache_dtype="int8")
    assert toolkit.patch(recurrent).kv_cache_dtype == "auto"
