"""Positions of ordinary forwards that are no integers: the frames of Qwen3-Omni's videos lie between whole numbers."""

import copy

import pytest
import torch

import toolkit
from toolkit.testing.architectures import small_model
from toolkit.testing.models import random_model


def test_whole_numbers_have_the_bits_of_integers():
    model = random_model("llama")
    toolkit.patch(model, ["rotary"])
    x, positions = torch.zeros(1, 5, 8), torch.tensor([[0, 1, 7, 2000, 40000]])
    expected = model.model.rotary_emb(x, positions)
    for found in (model.model.rotary_emb(x, positions.float()), model.model.rotary_emb(x, positions.double())):
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("family", "axes"), [("llama", 0), ("qwen3_5_text", 3)])
def test_fractions_are_the_models_own(family, axes):
    stock = small_model(family) if axes else random_model(family)
    model = copy.deepcopy(stock)
    toolkit.patch(model, ["rotary"])
    shape = (axes, 2, 9) if axes else (2, 9)
    positions = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 300
    find = lambda one: next(m for n, m in one.named_modules() if n.endswith("rotary_emb"))  # noqa: E731
    found, expected = (find(one)(torch.zeros(2, 9, 8), positions.float()) for one in (model, stock))
    for mine, own in zip(found, expected, strict=True):
        assert mine.shape == own.shape
        assert (mine - own).abs().max() <= 1e-4  # of angles up to 300 in float32
