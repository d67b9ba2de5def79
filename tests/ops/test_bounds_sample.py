"""Sampling and penalties: the tokens and bits of the specification, batch-invariant."""

import pytest
import torch

from tests.helpers.bounds import assert_same_bits, integers, noise, subsets
from tests.helpers.implementations import (
    FLOATS,
    HALF,
    SMALL,
    impl_and_dtype,
    needs_cuda,
)
from toolkit.ops.sample import penalize, reference, sample

ROWS = 9 if SMALL else 96
VOCABULARIES = [61, 700] if SMALL else [61, 32000, 151936]
# temperature, top_k, top_p, min_p
FILTERS = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 20, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.0, 40, 0.95, 0.02),
    (1.7, 1, 1.0, 0.0),
    (0.3, 0, 1e-9, 0.0),
]


def columns(rows, seed=0):
    filters = [FILTERS[(row * 7 + seed) % len(FILTERS)] for row in range(rows)]
    temperature, top_k, top_p, min_p = (torch.tensor(values) for values in zip(*filters, strict=True))
    seeds, steps = integers(-(2**62), 2**62, rows, seed=seed), integers(0, 2**40, rows, seed=seed + 1)
    return temperature.double(), top_k, top_p.double(), min_p.double(), seeds, steps


@impl_and_dtype(FLOATS)
@pytest.mark.parametrize("size", VOCABULARIES)
def test_tokens_are_those_of_the_specification(impl, dtype, size):
    """The specification computes in float64; the fate of a sample hangs on rounding once in some 1e9."""
    logits = noise(ROWS, size, dtype=dtype, scale=3.0)
    logits[4::9, ::3] = -torch.inf
    logits[5::9] = (logits[5::9] * 2).round()
    before = logits.clone()
    rest = columns(ROWS)
    tokens, logprobs = sample(logits, *rest)
    assert torch.equal(logits, before)
    wanted, expected = reference.sample(logits.cpu(), *(x.cpu() for x in rest))
    assert torch.equal(tokens.cpu(), wanted)
    torch.testing.assert_close(logprobs.cpu(), expected, rtol=1e-11, atol=1e-11)
    assert_same_bits(sample(logits, *rest), (tokens, logprobs))
    for part in subsets(ROWS):
        assert_same_bits(sample(logits[part], *(x[part] for x in rest)), (tokens[part], logprobs[part]))
    joined = torch.cat([logits, logits], -1)
    assert_same_bits(sample(joined[:, size:], *rest), (tokens, logprobs))
    assert sample(logits[:0], *(x[:0] for x in rest))[0].shape == (0,)


def test_rows_without_a_distribution(impl):
    logits = noise(ROWS, 300)
    logits[1, [17, 200]] = torch.nan
    logits[2, [18, 201]] = torch.inf
    logits[3] = -torch.inf
    for seed in range(3):
        rest = columns(ROWS, seed)
        tokens, logprobs = sample(logits, *rest)
        wanted, expected = reference.sample(logits.cpu(), *(x.cpu() for x in rest))
        assert tokens[1:4].tolist() == [17, 18, 0]
        assert bool(logprobs[1:4].isnan().all())
        assert torch.equal(tokens.cpu(), wanted)
        torch.testing.assert_close(logprobs.cpu(), expected, rtol=1e-11, atol=1e-11, equal_nan=True)


def test_samples_follow_the_distribution(impl):
    """Chi-square of many samples from one distribution of a few tokens."""
    count = 40 if SMALL else 100_000
    weights = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03], dtype=torch.float64)
    logits = weights.log().float().to(torch.get_default_device()).expand(count, -1)
    one = torch.ones(count, dtype=torch.float64)
    none = torch.zeros(count, dtype=torch.int64)
    tokens, logprobs = sample(logits, one, none, one, 0 * one, none + 5, torch.arange(count))
    seen = torch.bincount(tokens.cpu(), minlength=5).double()
    assert float(((seen - count * weights).square() / (count * weights)).sum()) < 23.5  # once in 1e4
    torch.testing.assert_close(logprobs.cpu(), weights.log()[tokens.cpu()], rtol=1e-6, atol=1e-6)


def histories(rows, size):
    """Arguments of ``penalize`` after the logits."""
    lengths = integers(0, 50, rows, seed=4)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    suppressed = torch.arange(rows + 1) * 2
    return [
        integers(-2, size + 3, int(offsets[-1]), seed=5),
        offsets,
        lengths // 2,
        0.5 + noise(rows, dtype=torch.float64, seed=6).abs(),
        noise(rows, dtype=torch.float64, seed=7),
        noise(rows, dtype=torch.float64, seed=8),
        integers(0, size + 3, 2 * rows, seed=9),
        suppressed,
    ]


@impl_and_dtype(FLOATS)
@pytest.mark.parametrize("size", VOCABULARIES[:2])
def test_penalties_have_the_bits_of_the_specification(impl, dtype, size):
    logits = noise(ROWS, size, dtype=dtype, scale=3.0)
    rest = histories(ROWS, size)
    got = penalize(logits, *rest)
    assert got.dtype == torch.float32
    assert torch.equal(got.cpu(), reference.penalize(logits.cpu(), *(x.cpu() for x in rest)))
    ends = rest[1][1:2]
    first = [rest[0][: int(ends)], rest[1][:2], *(x[:1] for x in rest[2:6]), rest[6][:2], rest[7][:2]]
    assert torch.equal(penalize(logits[:1], *first), got[:1])


@needs_cuda
def test_logits_past_two_to_the_31_elements(impl):
    size = 151936
    logits = torch.zeros((1 << 31) // size + 7, size, dtype=HALF)
    part = slice(logits.shape[0] - 6, logits.shape[0])
    logits[part] = noise(6, size, dtype=HALF, scale=3.0)
    rest = [torch.cat([x] * (logits.shape[0] // x.shape[0] + 1))[: logits.shape[0]] for x in columns(8)]
    tokens, logprobs = sample(logits, *rest)
    some = sample(logits[part].clone(), *(x[part] for x in rest))
    assert_same_bits((tokens[part], logprobs[part]), some)
    del logits
    torch.cuda.empty_cache()
