"""Captured graphs after the passes: fewer ops, bitwise identical results."""

from collections import Counter

import pytest
import torch

import toolkit
from tests.helpers.step_functions import before_sampling
from toolkit.engine.step import decode_graphs
from toolkit.engine.step.graph import CapturedGraph, capture
from toolkit.engine.step.passes import optimize
from toolkit.ops.linear import linear
from toolkit.ops.quantised_linear import quantised_linear
from toolkit.ops.rms_norm import rms_norm
from toolkit.ops.rotary import rotary
from toolkit.ops.state_write import state_write
from toolkit.quantised import QuantisedWeight
from toolkit.testing.models import random_model

WEIGHTS = [torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) for n in (16, 16, 8)]
NORM = torch.linspace(0.5, 2.0, 16)
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def ops_of(graph: CapturedGraph) -> Counter:
    return Counter(str(node.op) for node in graph.nodes)


def optimized(function, *inputs) -> Counter:
    """The ops of the graph after the passes, whose replay was compared with the function on other numbers."""
    graph = optimize(capture(function, [x.clone() for x in inputs]))
    replay = graph.compile()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        others = [torch.randn(x.shape, generator=generator) for x in inputs]
        assert torch.equal(replay(*others), function(*others))
    return ops_of(graph)


def test_linears_of_one_input_are_grouped():
    ops = optimized(lambda x: torch.cat([linear(x, w) for w in WEIGHTS], -1) + linear(-x, WEIGHTS[0]).sum(), X)
    assert ops["toolkit.linear_group.default"] == 1
    assert ops["toolkit.linear.default"] == 1


def test_linears_with_quantised_weights_of_one_input_are_grouped():
    weights = [
        QuantisedWeight.of(torch.randn(n, 16, generator=torch.Generator().manual_seed(n)), format)
        for n, format in ((16, "nf4"), (24, "nf4"), (8, "int8"))
    ]
    bias = torch.linspace(0.0, 1.0, 24)

    def function(x):
        parts = [
            quantised_linear(x, w.codes, w.scales, bias if n == 24 else None, w.format, n)
            for w in weights
            for n in [len(w)]
        ]
        return torch.cat([*parts, linear(x, WEIGHTS[0]), linear(x, WEIGHTS[1])], -1)

    ops = optimized(function, X)
    assert ops["toolkit.quantised_linear_group.default"] == ops["toolkit.linear_group.default"] == 1
    assert ops["toolkit.quantised_linear.default"] == ops["toolkit.linear.default"] == 0


def test_linears_with_computed_weights_are_not():
    ops = optimized(lambda x: linear(x, WEIGHTS[0] * 2) + linear(x, WEIGHTS[1] * 3), X)
    assert ops["toolkit.linear.default"] == 2


def test_linears_of_an_input_that_is_written_in_between_are_not():
    def function(x):
        y = x * 1.0
        a = linear(y, WEIGHTS[0])
        y.add_(1.0)
        return a + linear(y, WEIGHTS[1])

    assert optimized(function, X)["toolkit.linear.default"] == 2


def test_a_sum_and_its_norm_are_one():
    def function(x, y):
        total = x + y
        normed = rms_norm(total, NORM, 1e-6)
        return normed * total + rms_norm(total, None, 1e-6)

    ops = optimized(function, X, X)
    assert ops["toolkit.add_rms_norm.default"] == 1
    assert ops["toolkit.rms_norm.default"] == 1
    assert ops["aten.add.Tensor"] == 1  # the last one


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: rms_norm(torch.add(x, y, alpha=2.0), None, 1e-6),
        lambda x, y: rms_norm(x + y[:1], None, 1e-6),
        lambda x, y: rms_norm(x + 1.0, None, 1e-6) * y,
    ],
)
def test_other_sums_stay(function):
    ops = optimized(function, X, X)
    assert ops["toolkit.rms_norm.default"] == 1
    assert ops["aten.add.Tensor"] == 1


def test_views_of_views_are_one_and_taken_once():
    table = torch.rand(3, 8)

    def function(x):
        y = linear(x, WEIGHTS[0])
        a = y.view(1, 3, -1, 8)[0].view(3, 2, 8)
        b = y.view(3, 2, 8)
        return rotary(a, table, table)[None][0].unsqueeze(0).view(3, 16) + b.reshape(3, 16) + y

    ops = optimized(function, X)
    assert ops["aten.view.default"] == 2
    assert not ops["aten.select.int"] + ops["aten.unsqueeze.default"]


def test_views_of_parts_and_of_inputs_stay():
    assert optimized(lambda x: (x * 2)[1:].reshape(2, 2, 8)[:, 1] + x.view(3, 2, 8)[:2, 0], X)["aten.view.default"] >= 1


def test_what_nobody_reads_goes_and_writes_stay():
    pool = torch.zeros(4, 1, 16)

    def function(x):
        torch.exp(x)
        state_write(pool, x.detach()[:, None], torch.tensor([0, 2, 3]))
        return pool.sum() + x.sum()

    graph = optimize(capture(function, [X]))
    ops = ops_of(graph)
    assert ops["toolkit.state_write.default"] == 1
    assert not ops["aten.exp.default"] + ops["aten.detach.default"]
    pool.zero_()
    torch.testing.assert_close(graph.compile()(X * 2), (X * 2).sum() * 2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "mistral", "gpt_neox"])
def test_passes_leave_decode_steps_bitwise_identical(family, monkeypatch):
    model = random_model(family)
    prompts = [[5, 6, 7], [9, 8], list(range(40, 70))]
    params = toolkit.SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    counts, results = [], []

    def counting(graph, change):
        counts.append(len(before_sampling(change(graph))))
        return graph

    for change in (lambda graph: graph, optimize):
        monkeypatch.setattr(decode_graphs, "optimize", lambda graph, change=change: counting(graph, change))
        with toolkit.Engine(model, max_num_seqs=4, max_model_len=64) as engine:
            results.append(engine.generate(prompts, params))
    for plain, short in zip(*results):
        assert plain.token_ids == short.token_ids
        assert plain.logprobs == short.logprobs
    assert counts[1] < 0.9 * counts[0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_steps_over_pages_of_eight_bits_are_captured_and_as_short(family, monkeypatch):
    counts, results, fused = {}, [], set()
    params = toolkit.SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    for kept in ("auto", "int8"):
        for change in (lambda graph: graph, optimize):
            model = random_model(family)

            def counting(graph, change=change, kept=kept):
                counts[kept, change is optimize] = len(before_sampling(change(graph)))
                fused.update(str(node.op) for node in graph.nodes)
                return graph

            monkeypatch.setattr(decode_graphs, "optimize", counting)
            with toolkit.Engine(model, max_num_seqs=4, max_model_len=64, kv_cache_dtype=kept) as engine:
                results.append(engine.generate([[5, 6, 7], [9, 8], list(range(40, 70))], params))
    assert counts["int8", True] == counts["auto", True] < counts["int8", False]
    assert {"toolkit.rotary_write_int8.default", "toolkit.attention_int8.default"} <= fused
    for plain, short in zip(*results[2:]):
        assert plain.logprobs == short.logprobs
    assert results[0][0].logprobs != results[2][0].logprobs
