"""sample: which tokens top_k, top_p and min_p keep, and with which frequency they are sampled."""

import math

import pytest
import torch
from torch import Tensor

from tests.helpers.implementations import (
    NATIVE,
    REFERENCE,
    TRITON,
    implementations,
    only_triton,
)
from tests.helpers.rowwise import seeded
from tests.helpers.sampling import FILTERS, columns, warped
from toolkit.ops.sample import reference, sample


@pytest.mark.parametrize("vocabulary", [2, 61, 997, 8192])
def test_filters_keep_what_transformers_keeps(impl, vocabulary):
    """A token's probability is its weight by the sum of the weights kept, so it tells the set."""
    rows = 2 if impl is TRITON else 20
    for at, one in enumerate(FILTERS):
        logits = seeded(rows, vocabulary, scale=3.0, seed=at)
        tokens, logprobs = sample(logits, *columns([one] * rows, seed=at), impl=impl.option)
        theirs = warped(logits.double(), *one).gather(1, tokens[:, None])[:, 0].log()
        torch.testing.assert_close(logprobs, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 0.1])
def test_nuclei_of_flat_distributions(impl, scale):
    logits = seeded(4, 5000, scale=scale)
    rest = columns([(1.0, 0, 0.95, 0.0)] * 4)
    tokens, logprobs = sample(logits, *rest, impl=impl.option)
    if scale == 0:
        assert tokens.tolist() == (reference.uniforms(*rest[4:]) * 4750).long().tolist()
        torch.testing.assert_close(logprobs, torch.full((4,), -math.log(4750), dtype=torch.float64))
    else:
        theirs = warped(logits.double(), 1.0, 0, 0.95, 0.0).gather(1, tokens[:, None])[:, 0].log()
        torch.testing.assert_close(logprobs, theirs, rtol=1e-12, atol=1e-12)


def sampled(logits: Tensor, one: tuple[float, int, float, float], impl: str | None, count: int = 600) -> list[int]:
    """The distinct tokens of many samples from one row."""
    rest = columns([one] * count)
    return sorted(set(sample(logits.expand(count, -1), *rest, impl=impl)[0].tolist()))


@implementations(REFERENCE, NATIVE)
def test_ties_at_the_edge_of_the_nucleus_go_to_the_lowest_ids(impl):
    logits = torch.tensor([0.1, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1], dtype=torch.float64).log()
    kept = [sampled(logits, (1.0, 0, p, 0.0), impl.option) for p in (0.05, 0.3, 0.65, 0.75, 1.0)]
    assert kept == [[1], [1, 3], [0, 1, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5, 6]]
    many = logits.repeat(60)  # more equals than are sorted at a time; each of the most probable has 1/300
    first = [i for i in range(420) if i % 7 % 2][:18]
    assert sampled(many, (1.0, 0, 0.0599, 0.0), impl.option) == first


@implementations(REFERENCE, NATIVE)
def test_ties_at_the_kth_value_are_kept(impl):
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0, -1.0])
    assert [sampled(logits, (1.0, k, 1.0, 0.0), impl.option) for k in (1, 2, 3, 4, 5)] == [
        [1], [1, 2, 3, 5], [1, 2, 3, 5], [1, 2, 3, 5], [0, 1, 2, 3, 5],
    ]  # fmt: skip
    assert sampled(torch.tensor([-0.0, 0.0, -1.0]), (1.0, 1, 1.0, 0.0), impl.option) == [0, 1]
    assert sampled(torch.tensor([-math.inf, 0.0, -math.inf, 1.0]), (1.0, 3, 1.0, 0.0), impl.option) == [1, 3]


@implementations(REFERENCE, NATIVE)
def test_the_most_probable_token_is_always_in(impl):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 2.0])
    assert sampled(logits, (1.0, 0, 0.0, 0.0), impl.option) == [2]
    assert sampled(logits, (1.0, 3, 0.0, 0.0), impl.option) == [2]
    assert sampled(logits, (1.0, 0, 1.0, 2.0), impl.option) == [2, 4]


@implementations(REFERENCE, NATIVE)
@pytest.mark.parametrize("one", [FILTERS[at] for at in (0, 1, 3, 6, 8, 10)])
def test_samples_follow_the_distribution(impl, one):
    """Chi-square of 40,000 samples of one seed, a step each."""
    samples, vocabulary = 40_000, 23
    logits = seeded(1, vocabulary, seed=3)
    temperature, top_k, top_p, min_p, _, _ = columns([one] * samples)
    seeds, steps = torch.full((samples,), 5), torch.arange(samples)
    tokens, _ = sample(logits.expand(samples, -1), temperature, top_k, top_p, min_p, seeds, steps, impl=impl.option)
    expected = warped(logits, *one)[0]
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    chi2 = ((counts - samples * expected)[some] ** 2 / (samples * expected[some])).sum()
    freedom = int(some.sum()) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 1


@only_triton
@pytest.mark.usefixtures("impl")
def test_ties_by_log_probability():
    """A log-probability is over the sum of what is kept, so one sample tells how many equals are in."""
    logits = torch.tensor([2.0, -0.0, 0.0, 0.0, 0.0, -9.0]).expand(8, -1)  # 2 has 0.65 of the mass, a 0 has 0.088
    edges = [(1.0, k, 1.0, 0.0) for k in (1, 2, 4, 5)] + [(1.0, 0, p, 0.0) for p in (0.0, 0.7, 0.8, 0.9)]
    rest = columns(edges)
    tokens, logprobs = sample(logits, *rest)
    weights = torch.where(tokens == 0, 2.0, 0.0).double().exp()
    equals = weights / logprobs.exp() - math.exp(2.0)
    assert equals.round(decimals=9).abs().tolist() == [0, 4, 4, 4, 0, 1, 2, 3]
    rest = columns([(1.0, 0, 0.95, 0.0)] * 2)
    assert sample(torch.zeros(2, 5000), *rest)[0].tolist() == (reference.uniforms(*rest[4:]) * 4750).long().tolist()
