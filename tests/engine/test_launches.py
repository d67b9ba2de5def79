"""Captured decode steps of fast mode, with joined weights and without: few kernels, the numbers of eager steps."""

from collections import Counter

import pytest
import torch

import toolkit
from tests.helpers.step_functions import before_sampling
from toolkit.engine.step import decode_graphs
from toolkit.engine.step.executors import EXECUTORS, straight_line
from toolkit.engine.step.recorded import recorded_replay
from toolkit.testing.models import random_model

PROMPTS = [[5, 6, 7], [9, 8], list(range(40, 70))]
PARAMS = toolkit.SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def is_view(node):
    returned = node.op._schema.returns
    return bool(returned) and all(one.alias_info is not None and not one.alias_info.is_write for one in returned)


def kernels(family, layers, join, monkeypatch, **settings):
    """The ops of a decode step up to the logits that are no views."""
    found = []
    optimize = decode_graphs.optimize

    def noting(graph):
        found.append(optimize(graph))
        return graph

    monkeypatch.setattr(decode_graphs, "optimize", noting)
    model = random_model(family, layers=layers, **settings)
    toolkit.patch(model, numerics="fast", join_weights=join)
    with toolkit.Engine(model, max_num_seqs=4, max_model_len=64) as engine:
        engine.generate(PROMPTS, PARAMS)
    monkeypatch.undo()
    return Counter(str(node.op) for node in before_sampling(found[0]) if not is_view(node))


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {}), ("llama", {"attention_bias": True}), ("qwen3", {}), ("mistral", {}), ("gemma", {})],
)
def test_a_dense_layer_of_fast_mode_launches_few_kernels(family, settings, join, monkeypatch):
    """Nine with joined weights, twelve without; bitwise mode's eight are in test_native_executor.py."""
    few, more = (kernels(family, layers, join, monkeypatch, **settings) for layers in (2, 3))
    of_a_layer = more - few
    assert not few - more
    assert sum(of_a_layer.values()) <= (9 if join else 12), of_a_layer
    assert of_a_layer["toolkit.joined_linear.default"] == (2 if join else 0)


@pytest.mark.parametrize("executor", [EXECUTORS, (straight_line,), (recorded_replay,)], ids=["own", "line", "recorded"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_decoding_with_joined_weights_follows_the_weights(family, executor):
    """Fast mode: written in place, moved elsewhere, joined again, asleep in between; each step's logits are the eager
    forward's to rounding."""
    model = random_model(family)
    toolkit.patch(model, numerics="fast", join_weights=True)
    generator = torch.Generator().manual_seed(0)

    def written():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)

    def moved():
        for parameter in model.parameters():
            parameter.data = parameter.detach() * 1.25

    def shared():
        model.share_memory()
        written()

    def slept():
        engine.sleep()
        written()
        engine.wake()

    with toolkit.Engine(model, max_num_seqs=4, max_model_len=64) as engine:
        engine.backend.graphs.executors = executor
        for change in (written, moved, lambda: toolkit.patch(model), written, shared, slept):
            change()
            samples = engine.generate(PROMPTS, PARAMS)
            texts = [[*prompt, *one.token_ids] for prompt, one in zip(PROMPTS, samples)]
            for one, logprob in zip(samples, toolkit.token_logprobs(model, texts)):
                torch.testing.assert_close(torch.tensor(one.logprobs), logprob[-12:].detach(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_passes_leave_steps_with_joined_weights_bitwise_identical(family, monkeypatch):
    model = random_model(family)
    toolkit.patch(model, numerics="fast", join_weights=True)
    own, results = decode_graphs.optimize, []
    for change in (lambda graph: graph, own):
        monkeypatch.setattr(decode_graphs, "optimize", change)
        with toolkit.Engine(model, max_num_seqs=4, max_model_len=64) as engine:
            results.append([(one.token_ids, one.logprobs) for one in engine.generate(PROMPTS, PARAMS)])
    assert results[0] == results[1]
