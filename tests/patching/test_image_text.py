"""Models with an image tower: the text layers are patched, towers keep their attention, and an image gives the same."""

import copy

import pytest
import torch

import toolkit
from tests.helpers.picture_models import ORDINARY, picture_model
from toolkit.patching.attention_configs import FIELD, attention_configs

FAST = ("qwen3_vl", "gemma3", "smolvlm")
ALL = [family if family in FAST else pytest.param(family, marks=pytest.mark.sweep) for family in ORDINARY]


def build(family):
    """A model, and a text with one picture of four tokens in it."""
    made = picture_model(family)
    return made.model, made.outputs([21, 22, 23, 9, "a", 10, *range(31, 39)])


def run(model, batch):
    """Loss, logits and all gradients in one vector."""
    model.zero_grad(set_to_none=True)
    output = model(**batch, labels=batch["input_ids"], use_cache=False)
    logits = output.logits.detach().clone()
    output.loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return output.loss.detach(), logits, torch.cat([gradient.flatten() for gradient in gradients])


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def implementations(model):
    return [getattr(config, FIELD) for config in attention_configs(model)]


@pytest.mark.parametrize("family", ALL)
def test_an_image_gives_the_same_loss_logits_and_gradients(family):
    model, batch = build(family)
    other = copy.deepcopy(model)
    other_image = batch | {"pixel_values": batch["pixel_values"] + 1.0}
    assert not torch.allclose(model(**batch).logits, model(**other_image).logits)  # the image is seen
    expected, before = run(model, batch), implementations(model)
    toolkit.patch(model)
    for got, wanted, near in zip(run(model, batch), expected, (1e-5, 1e-5, 1e-4), strict=True):
        assert relative(got, wanted) < near
    toolkit.unpatch(model)
    assert implementations(model) == before
    assert torch.equal(run(model, batch)[1], expected[1])
    assert implementations(other) == before


def test_a_tower_keeps_its_own_implementation_and_gets_it_back():
    model, batch = build("qwen3_vl")
    model.model.visual.set_attn_implementation("eager")
    expected, before = run(model, batch), implementations(model)
    report = toolkit.patch(model)
    assert {claim.path for claim in report.claims if claim.role == "attention"} == {
        f"model.language_model.layers.{layer}.self_attn" for layer in range(2)
    }
    assert model.model.visual.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "toolkit"
    model.model.visual.set_attn_implementation("sdpa")  # a tower's is its own to change
    assert relative(run(model, batch)[1], expected[1]) < 1e-5
    model.model.visual.set_attn_implementation("eager")
    toolkit.unpatch(model)
    assert implementations(model) == before
