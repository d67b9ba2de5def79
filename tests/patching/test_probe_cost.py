"""Probes of large modules: slices of them, of few rows, and never the module itself."""

import copy

import pytest
import torch
from torch import nn

import toolkit
from toolkit.numerics import Numerics
from toolkit.patching.attention_configs import attention_configs
from toolkit.patching.calls import record_calls
from toolkit.patching.probe_copy import KEPT, Slices, probe_copy
from toolkit.patching.roles import experts, head, linear, mlp
from toolkit.patching.skeleton import LeftOut, skeleton
from toolkit.testing.models import random_model


@pytest.fixture
def elements(monkeypatch):
    """How many elements each random parameter of a probe copy has."""
    made = []
    original = nn.Parameter.normal_

    def watched(self, *args, **kwargs):
        made.append(self.numel())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Parameter, "normal_", watched, raising=False)
    return made


def test_the_head_is_probed_on_a_few_rows(elements):
    model = random_model("llama", vocabulary=20_000)
    elements.clear()
    claims = head.find(model, Numerics.BITWISE)
    assert [claim.op for claim in claims] == ["linear_logprob (fixed reduction order)", "causal_lm_loss"]
    assert max(elements) == KEPT * 64


@pytest.mark.parametrize("family", ["llama", "phi3_longrope"])
def test_large_mlps_and_linear_layers_are_probed_on_slices(elements, family):
    model = random_model(family, intermediate_size=5000)
    elements.clear()
    assert [one.op[:16] for one in mlp.find(model, Numerics.BITWISE)] == ["gated_activation"] * 2
    assert {one.role for one in linear.find(model, Numerics.BITWISE)} == {"linear"}
    # down_proj as a linear layer keeps its 5,000 inputs, which are what it sums over, and has 64 outputs.
    assert max(elements) == 64 * 5000
    assert sorted(elements)[-2] <= 2 * KEPT * 64


def test_large_experts_are_probed_on_slices(elements):
    model = random_model("qwen3_moe", moe_intermediate_size=3000)
    elements.clear()
    found = [one for one in experts.find(model, Numerics.BITWISE) if getattr(one, "path", "")]
    assert [one.op for one in found] == ["experts (silu, halves)"] * 2
    assert max(elements) == 5 * 2 * KEPT * 64


def test_slices_of_a_models_own_parameters_are_spread_evenly():
    module = nn.Linear(4, 1000)
    copied = probe_copy(module, Slices.of(1000, {"weight": (0, 1), "bias": (0, 1)}), own_values=True)
    assert copied.weight.shape == (KEPT, 4)
    assert copied.out_features == KEPT
    assert torch.equal(copied.weight[[0, -1]], module.weight[[0, -1]])
    assert torch.equal(copied.bias[100], module.bias[round(100 * 999 / 255)])


@pytest.mark.parametrize("inner", [1, 2])
def test_slices_along_two_dimensions_copy_no_whole_experts(inner, monkeypatch):
    """All columns of the experts that are kept would be a gibibyte at Mixtral's width."""
    module, made = nn.Module(), []
    shape = [8, 3000, 4] if inner == 1 else [8, 4, 3000]
    module.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    slices = Slices({"weight": ((0, 5), (inner, KEPT))})
    original = torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda *a: made.append(original(*a)) or made[-1])
    copied = probe_copy(module, slices, own_values=True)
    assert max(one.numel() for one in made) == 8 * 4 * KEPT
    experts, columns = (torch.linspace(0, last, n).round().long() for last, n in ((7, 5), (2999, KEPT)))
    part = module.weight[experts]
    assert torch.equal(copied.weight, part[:, columns] if inner == 1 else part[:, :, columns])


def test_a_module_that_fails_on_slices_is_probed_as_a_whole():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(8, 600), nn.Linear(8, 600), nn.Linear(600, 8)

        def forward(self, x):
            return self.down(torch.nn.functional.silu(self.gate(x).view(*x.shape[:-1], 600)) * self.up(x))

    (found,) = mlp.find(nn.ModuleList([Fixed()]), Numerics.BITWISE)
    assert found.op == "gated_activation (silu of gate)"


def test_a_skeleton_has_a_layer_of_each_kind_and_shares_the_weights():
    model = random_model("gemma2", layers=6)
    copied = skeleton(model)
    left_out = [isinstance(layer, LeftOut) for layer in copied.model.layers]
    assert left_out == [False, False, True, True, True, True]
    assert copied.model.layers[0].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight
    assert copied.model.layers[4].self_attn is copied.model.layers[0].self_attn
    assert copied.config is not model.config


@pytest.mark.parametrize("family", ["gemma2", "deepseek_v3", "qwen3_next"])
def test_calls_of_a_skeleton_are_those_of_the_model(family, monkeypatch):
    model = random_model(family, layers=2) if family == "qwen3_next" else random_model(family, layers=5)
    layers = [one for one in model.modules() if hasattr(one, "is_causal") and hasattr(one, "layer_idx")]
    found = record_calls(model, layers, 2, 7, 3)
    monkeypatch.setattr("toolkit.patching.calls.skeleton", copy.deepcopy)
    for layer, expected in record_calls(model, layers, 2, 7, 3).items():
        for got, one in zip(found[layer], expected, strict=True):
            assert got.arguments.keys() == one.arguments.keys()
            for name in ("position_embeddings", "attention_mask", "position_ids"):
                torch.testing.assert_close(got.arguments.get(name), one.arguments.get(name), rtol=0, atol=0)


def test_a_patch_makes_no_copy_of_a_layer_that_is_left_out(elements):
    made = []
    for layers in (2, 7):
        model = random_model("llama", layers=layers)
        elements.clear()
        toolkit.patch(model)
        made.append(sum(elements))
    assert made[0] == made[1]


def test_a_skeleton_has_no_configuration_of_the_model():
    model = random_model("llama", layers=3)
    for layer in model.model.layers:
        layer.config = model.config
    copied = skeleton(model)
    assert isinstance(copied.model.layers[2], LeftOut)
    assert copied.model.layers[2].config is copied.config
    assert all(config is not model.config for config in attention_configs(copied))
