"""Which modules one probe stands for: what they compute by, and not which layer they are."""

import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toolkit.patching.probe import signature_key
from toolkit.patching.settings import settings_of
from toolkit.testing.models import random_model


class Layer(nn.Module):
    def __init__(self, layer_idx=0, heads=(2, 3), scale=None, act=F.gelu, slopes=(1.0, 2.0), bias=0.0):
        super().__init__()
        self.layer_idx, self.heads, self.scale, self.act = layer_idx, heads, scale, act
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("slopes", torch.tensor(slopes), persistent=False)
        self.register_buffer("correction", torch.full((3,), bias))  # of a checkpoint, which forwards read

    def forward(self, x):
        return self.act(x)


@pytest.mark.parametrize(
    "other",
    [
        {"heads": (2, 4)},
        {"heads": None},
        {"scale": 1.0},
        {"act": F.silu},
        {"act": torch.tanh},
        {"act": partial(F.gelu, approximate="tanh")},
        {"slopes": (1.0, 3.0)},
        {"slopes": (1.0, 2.0, 3.0)},
    ],
    ids=["other heads", "no heads", "a float", "a function", "a builtin", "a partial", "other slopes", "more slopes"],
)
def test_what_a_layer_computes_by_is_in_its_key(other):
    assert signature_key(Layer(**other)) != signature_key(Layer())


def test_a_dtype_is_in_the_key():
    assert signature_key(Layer().bfloat16()) != signature_key(Layer())


def test_which_layer_it_is_and_its_weights_are_not():
    one, other = (Layer(at, act=partial(F.gelu, approximate="none"), bias=float(at)) for at in (0, 7))
    other.weight.data.fill_(5.0)
    assert signature_key(one) == signature_key(other)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "qwen3_moe"])
def test_layers_of_a_kind_share_a_key(family):
    layers = random_model(family, layers=4).model.layers
    assert signature_key(layers[3]) == signature_key(layers[2])


def test_hooks_of_accelerate_leave_the_kind():
    hooks = pytest.importorskip("accelerate.hooks")
    one, other, plain = Layer(), Layer(), signature_key(Layer())
    for layer in (one, other):
        hooks.add_hook_to_module(layer, hooks.ModelHook())
    assert signature_key(one) == signature_key(other) == plain
    other._old_forward = types.MethodType(lambda self, x: x, other)
    assert signature_key(other) != plain


def test_functions_of_any_kind_are_settings():
    layer = Layer(act=torch.tanh)
    assert dict(settings_of(layer))["act"] is torch.tanh
    layer.act = layer.extra_repr
    assert dict(settings_of(layer))["act.__func__"] is nn.Module.extra_repr
