"""Layers that write keys and values for later ones into a mapping, and layers that read them there (Gemma 3n)."""

from collections import UserDict

import pytest
import torch
from torch import nn

import toolkit
from toolkit.patching.attention_probe import LENGTH, PROBE_WINDOW, ROWS, Probe
from toolkit.patching.calls import map_tensors, record_calls
from toolkit.patching.probe import compare
from toolkit.testing.architectures import small_model

SHARED = "shared_kv_states"


@pytest.fixture(scope="module")
def model():
    return small_model("gemma3n_text")


def attention(model):
    return [module for module in model.modules() if hasattr(module, "is_kv_shared_layer")]


@pytest.fixture(scope="module")
def calls(model):
    layers = attention(model)
    return [call for (call,) in record_calls(model, layers, ROWS, LENGTH, PROBE_WINDOW).values()]


def test_every_layer_is_claimed(model):
    found = toolkit.patching.apply.find_claims(model, ["attention"])
    assert [(one.role, one.reason) for one in found.skipped] == []
    assert len(found.claims) == len(attention(model))


def test_a_recorded_call_has_the_mapping_as_it_was(calls):
    shared = [call.arguments[SHARED] for call in calls]
    assert len({id(one) for one in shared}) == len(shared)
    assert len(shared[0]) == 0 < len(shared[-1])
    assert isinstance(shared[0], UserDict)


def test_a_probe_leaves_nothing_in_a_recorded_call(model, calls):
    for layer, call in zip(attention(model), calls, strict=True):
        before = {name: [id(x) for x in kept] for name, kept in call.arguments[SHARED].items()}
        assert Probe(layer, call).error(thorough=False).passes()
        assert {name: [id(x) for x in kept] for name, kept in call.arguments[SHARED].items()} == before
        assert not any(x.requires_grad for kept in call.arguments[SHARED].values() for x in kept)


def test_the_gradients_of_a_probe_stop_at_what_was_kept_of_another_run():
    weight = nn.Parameter(torch.ones(3, 3))
    kept = (torch.ones(2, 3) @ weight).tanh()
    kept.sum().backward()  # which frees its graph
    expected = weight.grad.clone()
    assert compare(lambda x: 2 * x + kept, lambda x: x + x + kept, [[torch.ones(2, 3)]]).passes()
    assert torch.equal(weight.grad, expected)


def test_tensors_are_mapped_inside_of_containers_which_are_new():
    given = {"list": [torch.zeros(1), 3], "pair": (torch.zeros(2), None), "mapping": UserDict(a=torch.zeros(3))}
    got = map_tensors(given, lambda x: x + 1)
    assert got["list"] == [torch.ones(1), 3]
    assert got["pair"][1] is None
    assert isinstance(got["mapping"], UserDict)
    assert torch.equal(got["mapping"]["a"], torch.ones(3))
    assert torch.equal(given["mapping"]["a"], torch.zeros(3))
    assert got["list"] is not given["list"]
