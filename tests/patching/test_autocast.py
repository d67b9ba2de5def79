"""Attention inside autocast takes q, k and v in its dtype, as transformers' own attention does."""

import copy

import pytest
import torch

import toolkit
from toolkit.modules.autocast import autocast_inputs
from toolkit.testing.architectures import small_model
from toolkit.testing.models import random_model
from toolkit.testing.oracle import eager

EPSILON = torch.finfo(torch.bfloat16).eps
IDS = torch.arange(3, 29).view(2, 13)
SEQUENCES = [row.tolist() for row in IDS]


def distance(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def step(model, enabled):
    """Logits, and all gradients in one vector."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        output = model(IDS, labels=IDS, use_cache=False)
    logits = output.logits.detach().clone()
    output.loss.backward()
    return logits, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("roles", [["attention"], None], ids=["attention", "every role"])
@pytest.mark.parametrize(
    "family",
    ["deepseek_v3", "qwen3", *(pytest.param(one, marks=pytest.mark.sweep) for one in ("llama", "gemma2", "gpt_neox"))],
)
def test_a_training_step_is_as_near_to_float32_as_the_stock_model(family, roles):
    """Multiplied by rotary tables q and k are float32, where v is bfloat16."""
    model = random_model(family)
    stock = eager(copy.deepcopy(model)).train()
    exact, own = step(stock, False), step(stock, True)
    toolkit.patch(model.train(), roles=roles)
    got = step(model, True)
    for one, other, truth in zip(got, own, exact, strict=True):
        assert one.dtype == other.dtype
        error, allowed = distance(one, truth), distance(other, truth)
        assert EPSILON / 10 < error <= 1.5 * allowed + EPSILON / 4


@pytest.mark.parametrize("roles", [["attention"], None], ids=["attention", "every role"])
def test_attention_returns_the_dtype_of_the_stock_layer(roles):
    model = random_model("deepseek_v3", attn_implementation="eager")
    layer = model.model.layers[0].self_attn
    hidden = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    tables = model.model.rotary_emb(hidden, torch.arange(5)[None])
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(hidden, position_embeddings=tables, attention_mask=None)[0]
        toolkit.patch(model, roles=roles)
        got = layer(hidden, position_embeddings=tables, attention_mask=None)[0]
    assert got.dtype == expected.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "gpt_oss", "phi3_longrope", pytest.param("deepseek_v32", marks=pytest.mark.sweep)]
)
def test_a_ragged_batch_inside_autocast(family):
    """By latents, with sinks and windows, with tables by the length of the sequence, by an indexer's selection."""
    build = small_model if family == "deepseek_v32" else random_model
    model = build(family, attn_implementation="eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        own = model(IDS).logits[:, :-1]
    with torch.no_grad():
        exact = model(IDS).logits[:, :-1]
    wanted, allowed = (x.double().log_softmax(-1).gather(-1, IDS[:, 1:, None]).flatten() for x in (exact, own))
    toolkit.patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.cat(toolkit.token_logprobs(model, SEQUENCES))
    got.sum().backward()
    assert 1e-4 < distance(got.detach(), wanted) <= 1.5 * distance(allowed, wanted) + EPSILON / 4
    with torch.no_grad():
        assert distance(torch.cat(toolkit.token_logprobs(model, SEQUENCES)), wanted) < 1e-5


def test_inputs_are_in_the_dtype_of_autocast_but_for_float64():
    single, half, double = (torch.ones(2, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.float64))
    assert [one.dtype for one in autocast_inputs(single, half)] == [torch.float32, torch.float16]
    assert autocast_inputs() == ()
    with torch.autocast("cpu", torch.bfloat16):
        assert [one.dtype for one in autocast_inputs(single, half, double)] == [
            torch.bfloat16, torch.bfloat16, torch.float64,
        ]  # fmt: skip
        assert torch.mm(torch.ones(2, 2).double(), torch.ones(2, 2).double()).dtype == torch.float64
