"""Training and the engine agree on quantised models, token for token and bit for bit."""

import pytest
import torch

import toolkit
from tests.test_parity import prompts_for
from toolkit.engine.step.decode_graphs import DecodeGraphs
from toolkit.engine.step.graph import PLAIN_TENSORS
from toolkit.engine.step.native import NativeReplay
from toolkit.ops import native
from toolkit.ops.quantised_linear import makers
from toolkit.quantised import quantise
from toolkit.testing.models import random_model
from toolkit.testing.parity import check_parity
from toolkit.testing.weight_writes import weight_writes

CASES = [
    pytest.param(family, format, dtype, marks=() if (family, format) == ("llama", "nf4") else pytest.mark.sweep)
    for family in ("llama", "qwen3_moe", "qwen3_next_moe")
    for format in makers()
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("family", "format", "dtype"), CASES)
def test_no_token_differs_on_a_quantised_model(family, format, dtype):
    model = random_model(family).to(dtype)
    quantise(model, format)
    parity = check_parity(model, prompts_for(331), min_tokens=300, max_new_tokens=16, seed=1)
    assert parity.tokens >= 300
    assert parity.differing == parity.replayed_differing == 0
    assert parity.prefix_cache_hits > 0


def test_no_token_differs_when_quantised_weights_are_written_meanwhile():
    model = random_model("llama", hidden=32)
    quantise(model, "int8")
    parity = check_parity(model, prompts_for(331), min_tokens=200, max_new_tokens=12, seed=1, writes=True)
    assert parity.differing == 0
    assert {"a weight quantised again", "codes copied"} <= set(parity.writes) == set(weight_writes(model))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_decode_steps_are_captured_on_plain_tensors(family, monkeypatch):
    model = random_model(family)
    quantise(model, "nf4")
    toolkit.patch(model)
    replays = []
    executable = DecodeGraphs._executable

    def kept(self, graph):
        replays.append((graph, executable(self, graph)))
        return replays[-1][1]

    monkeypatch.setattr(DecodeGraphs, "_executable", kept)
    with toolkit.Engine(model) as engine:
        engine.generate([[5, 6, 7]] * 2, toolkit.SamplingParams(max_tokens=8, ignore_eos=True))
    for graph, replay in replays:
        assert {type(value.tensor) for value in graph.values} <= PLAIN_TENSORS
        assert isinstance(replay, NativeReplay) == (native.load() is not None)
    assert replays
