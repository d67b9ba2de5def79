"""Modules that are something else only with their own parameters, in training mode, in 16 bits or past a threshold."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

import toolkit
from toolkit.numerics import Numerics
from toolkit.patching.claim import Claim
from toolkit.patching.roles import linear, norm, rotary
from toolkit.patching.thresholds import around, thresholds
from toolkit.testing.models import random_model


class Norm(nn.Module):
    """An RMS norm, except where ``odd`` says so."""

    def __init__(self, odd: str = "") -> None:
        super().__init__()
        self.weight, self.eps, self.odd = nn.Parameter(torch.full((24,), 40.0)), 1e-6, odd

    def forward(self, x):
        if self.odd == "narrow":  # squares and averages in x's own type
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
        dtype, full = x.dtype, x.float()
        full = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.odd == "training" and self.training:
            full = full * 1.01
        if self.odd == "bfloat16" and dtype == torch.bfloat16:
            full = full * 1.5
        weight = self.weight.clamp(max=10.0) if self.odd == "own" else self.weight
        return weight * full.to(dtype)


def found(module):
    (one,) = norm.find(nn.ModuleList([module]), Numerics.BITWISE)
    return one


@pytest.mark.parametrize(
    ("odd", "dtype", "where"),
    [
        ("training", torch.float32, " with its own parameters in training mode"),
        ("own", torch.float32, " with its own parameters in training mode"),
        ("bfloat16", torch.bfloat16, " in bfloat16"),
    ],
)
def test_what_differs_under_one_condition_is_skipped(odd, dtype, where):
    assert isinstance(found(Norm().to(dtype)), Claim)
    one = found(Norm(odd).to(dtype))
    assert one.reason.startswith("it is not ")
    assert one.reason.endswith(where)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_candidate_that_is_nearer_to_float32_is_taken(dtype):
    assert isinstance(found(Norm("narrow").to(dtype)), Claim)


def test_a_candidate_that_is_farther_from_float32_is_not_taken():
    class Upcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 24) / 5), nn.Parameter(torch.zeros(24))

        def forward(self, x):
            return (x.float() @ self.weight.float() + self.bias.float()).float()

    assert isinstance(linear.find(nn.ModuleList([Upcast()]), Numerics.BITWISE)[0], Claim)
    (one,) = linear.find(nn.ModuleList([Upcast().bfloat16()]), Numerics.BITWISE)
    assert one.reason.endswith("in bfloat16")


def test_thresholds_are_the_integers_of_a_configuration():
    config = random_model("phi3_longrope").config
    assert {48, 512} <= set(thresholds(config))
    assert {47, 48, 49, 151} <= set(around(config))
    assert thresholds(None) == []


class Late(LlamaRotaryEmbedding):
    """Other angles from one position on."""

    def forward(self, x, position_ids):
        cos, sin = super().forward(x, position_ids)
        return torch.where((position_ids >= self.config.late)[..., None], cos * 1.1, cos), sin


def test_tables_that_change_past_a_number_of_the_configuration_are_skipped():
    model = random_model("llama", late=7777, max_position_embeddings=100_000)
    assert [type(one) for one in rotary.find(model, Numerics.BITWISE)] == [Claim]
    model.model.rotary_emb.__class__ = Late
    (one,) = rotary.find(model, Numerics.BITWISE)
    assert "probe error" in one.reason


class Between(LlamaAttention):
    """Queries scaled by 2 between two positions, and by 1 far beyond them."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, position_ids=None, **kwargs):
        cos, sin = position_embeddings
        if position_ids is not None:
            inside = (position_ids >= 700) & (position_ids < self.config.late)
            cos = torch.where(inside[..., None], cos * 2, cos)
        return super().forward(hidden_states, (cos, sin), attention_mask, **kwargs)


def test_attention_that_is_another_between_two_lengths_keeps_its_forward():
    model = random_model("llama", late=7777)
    for layer in model.model.layers:
        layer.self_attn.__class__ = Between
    report = toolkit.patch(model)
    assert {claim.op for claim in report.claims if claim.role == "attention"} == {"attention interface"}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [pytest.param("llama", torch.float16, marks=pytest.mark.sweep), ("qwen3_moe", torch.bfloat16)],
)
def test_16_bit_models_are_patched_as_float32_ones(family, dtype):
    report, expected = (toolkit.patch(random_model(family).to(one)) for one in (dtype, torch.float32))
    assert report.roles() == expected.roles()
    assert report.skipped == []
