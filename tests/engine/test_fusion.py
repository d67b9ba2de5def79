"""Recorded programs after fusion: fewer ops, the same bits."""

from collections import Counter

import pytest
import torch

import toolkit
from toolkit.engine import decode
from toolkit.engine.fusion import fuse
from toolkit.engine.program import build, record
from toolkit.ops.linear import linear
from toolkit.ops.rms_norm import rms_norm
from toolkit.ops.rotary import rotary
from toolkit.ops.state_write import state_write
from toolkit.testing.models import random_model

WEIGHTS = [torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) for n in (16, 16, 8)]
NORM = torch.linspace(0.5, 2.0, 16)
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def ops_of(recording) -> Counter:
    return Counter(str(call.op) for call in recording.calls)


def fused(function, *inputs) -> Counter:
    """The ops of the fused recording, after its replay was compared with the function on other numbers."""
    recording = fuse(record(function, [x.clone() for x in inputs]))
    program = build(recording)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        others = [torch.randn(x.shape, generator=generator) for x in inputs]
        assert torch.equal(program(*others), function(*others))
    return ops_of(recording)


def test_products_of_one_tensor_are_grouped():
    ops = fused(lambda x: torch.cat([linear(x, w) for w in WEIGHTS], -1) + linear(-x, WEIGHTS[0]).sum(), X)
    assert ops["toolkit.linear_group.default"] == 1
    assert ops["toolkit.linear.default"] == 1


def test_products_with_computed_weights_are_not():
    ops = fused(lambda x: linear(x, WEIGHTS[0] * 2) + linear(x, WEIGHTS[1] * 3), X)
    assert ops["toolkit.linear.default"] == 2


def test_products_of_a_tensor_that_is_written_in_between_are_not():
    def function(x):
        y = x * 1.0
        a = linear(y, WEIGHTS[0])
        y.add_(1.0)
        return a + linear(y, WEIGHTS[1])

    assert fused(function, X)["toolkit.linear.default"] == 2


def test_a_sum_and_its_norm_are_one():
    def function(x, y):
        total = x + y
        normed = rms_norm(total, NORM, 1e-6)
        return normed * total + rms_norm(total, None, 1e-6)

    ops = fused(function, X, X)
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
    ops = fused(function, X, X)
    assert ops["toolkit.rms_norm.default"] == 1
    assert ops["aten.add.Tensor"] == 1


def test_views_of_views_are_one_and_taken_once():
    table = torch.rand(3, 8)

    def function(x):
        y = linear(x, WEIGHTS[0])
        a = y.view(1, 3, -1, 8)[0].view(3, 2, 8)
        b = y.view(3, 2, 8)
        return rotary(a, table, table)[None][0].unsqueeze(0).view(3, 16) + b.reshape(3, 16) + y

    ops = fused(function, X)
    assert ops["aten.view.default"] == 2
    assert not ops["aten.select.int"] + ops["aten.unsqueeze.default"]


def test_views_of_parts_and_of_inputs_stay():
    assert fused(lambda x: (x * 2)[1:].reshape(2, 2, 8)[:, 1] + x.view(3, 2, 8)[:2, 0], X)["aten.view.default"] >= 1


def test_what_nobody_reads_goes_and_writes_stay():
    pool = torch.zeros(4, 1, 16)

    def function(x):
        torch.exp(x)
        state_write(pool, x.detach()[:, None], torch.tensor([0, 2, 3]))
        return pool.sum() + x.sum()

    recording = fuse(record(function, [X]))
    ops = ops_of(recording)
    assert ops["toolkit.state_write.default"] == 1
    assert not ops["aten.exp.default"] + ops["aten.detach.default"]
    pool.zero_()
    torch.testing.assert_close(build(recording)(X * 2), (X * 2).sum() * 2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "mistral", "gpt_neox"])
def test_decode_programs_keep_their_bits(family, monkeypatch):
    model = random_model(family)
    prompts = [[5, 6, 7], [9, 8], list(range(40, 70))]
    params = toolkit.SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    counts, results = [], []

    def counting(recording, change):
        counts.append(sum(ops_of(change(recording)).values()))
        return recording

    for change in (lambda recording: recording, fuse):
        monkeypatch.setattr(decode, "fuse", lambda recording, change=change: counting(recording, change))
        with toolkit.Engine(model, max_num_seqs=4, max_model_len=64) as engine:
            results.append(engine.generate(prompts, params))
    for plain, short in zip(*results):
        assert plain.token_ids == short.token_ids
        assert plain.logprobs == short.logprobs
    assert counts[1] < 0.9 * counts[0]
