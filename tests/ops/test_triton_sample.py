"""Triton sampling in Triton's interpreter, against the specification and a loop in Python."""

import math

import pytest
import torch
import triton
import triton.language as tl
from test_penalize import Rows
from test_sample import FILTERS, columns, oracle, some_filters

from tests.helpers.interpreter import poisoned
from tests.helpers.rowwise import seeded
from toolkit.errors import ToolkitError
from toolkit.ops.sample import reference
from toolkit.ops.sample.triton import MAX_BLOCK, ordered, penalize, sample, uniform, value_of


@pytest.fixture(autouse=True)
def fresh_memory_is_poisoned():
    with poisoned():
        yield


@triton.jit
def philox_words(counter, key, words):
    c0, c1, c2, c3 = tl.philox(
        tl.load(key),
        tl.load(counter).to(tl.uint32),
        tl.load(counter + 1).to(tl.uint32),
        tl.load(counter + 2).to(tl.uint32),
        tl.load(counter + 3).to(tl.uint32),
    )
    tl.store(words, c0.to(tl.int64))
    tl.store(words + 1, c1.to(tl.int64))
    tl.store(words + 2, c2.to(tl.int64))
    tl.store(words + 3, c3.to(tl.int64))


@triton.jit
def store_uniform(seeds, steps, result):
    at = tl.program_id(0)
    tl.store(result + at, uniform(tl.load(seeds + at), tl.load(steps + at)))


@triton.jit
def store_keys(values, keys, back, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    found = ordered(tl.load(values + at))
    tl.store(keys + at, found)
    tl.store(back + at, value_of(found))


def test_philox_and_uniforms_are_those_of_the_specification():
    generator = torch.Generator().manual_seed(0)
    cases = [
        ([0, 0, 0, 0], 0),
        ([0xFFFFFFFF] * 4, -1),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822),
    ]
    cases += [(torch.randint(2**32, (4,), generator=generator).tolist(), n * 0x1234567890ABCDE) for n in range(5)]
    for counter, key in cases:
        words = torch.zeros(4, dtype=torch.int64)
        philox_words[(1,)](torch.tensor(counter), torch.tensor([key]), words)
        halves = (torch.tensor(key & 0xFFFFFFFF), torch.tensor((key >> 32) & 0xFFFFFFFF))
        expected = reference.philox(tuple(map(torch.tensor, counter)), halves)
        assert words.tolist() == [int(word) for word in expected]
    seeds = torch.randint(-(2**63), 2**63 - 1, (50,), generator=generator)
    steps = torch.randint(0, 2**62, (50,), generator=generator)
    result = torch.zeros(50, dtype=torch.float64)
    store_uniform[(50,)](seeds, steps, result)
    assert torch.equal(result, reference.uniforms(seeds, steps))


def test_keys_order_floats_and_give_them_back():
    big, nan = torch.finfo(torch.float32).max, torch.nan
    values = torch.tensor([-torch.inf, -big, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, big, torch.inf, *[nan, -nan] * 3])
    keys, back = torch.zeros(16, dtype=torch.int32), torch.zeros(16)
    store_keys[(1,)](values, keys, back, SIZE=16)
    assert keys.tolist() == sorted(keys.tolist())
    assert len(set(keys.tolist())) == 10
    assert keys[4] == keys[5] == 0
    assert torch.equal(back[:10], values[:10])
    assert back[10:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 1), (8, 2), (16, 61), (12, 513), (3, 2 * MAX_BLOCK + 77)])
def test_matches_the_oracle_and_the_specification(dtype, rows, vocabulary):
    filters, rest = some_filters(rows, vocabulary), columns(some_filters(rows, vocabulary))
    logits = (seeded(rows, vocabulary) * torch.tensor([3.0, 0.1, 1.0, 30.0]).repeat(8)[:rows, None]).to(dtype)
    logits[5::7, ::3] = -torch.inf
    logits[5::7, 0] = 0.0
    logits[6::7] = (logits[6::7] * 2).round()
    tokens, logprobs = sample(logits, *rest)
    wanted, expected = reference.sample(logits, *rest)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
    uniforms = reference.uniforms(*rest[4:]).tolist()
    for row in range(rows):
        token, logprob = oracle(logits[row].double().tolist(), *filters[row], uniforms[row])
        assert int(tokens[row]) == token, (row, filters[row])
        assert abs(float(logprobs[row]) - logprob) < 1e-12


def test_ties():
    """A log-probability is over the sum of what is kept, so one draw tells how many equals are in."""
    logits = torch.tensor([2.0, -0.0, 0.0, 0.0, 0.0, -9.0]).expand(8, -1)  # 2 has 0.65 of the mass, a 0 has 0.088
    edges = [(1.0, k, 1.0, 0.0) for k in (1, 2, 4, 5)] + [(1.0, 0, p, 0.0) for p in (0.0, 0.7, 0.8, 0.9)]
    rest = columns(edges)
    tokens, logprobs = sample(logits, *rest)
    weights = torch.where(tokens == 0, 2.0, 0.0).double().exp()
    equals = weights / logprobs.exp() - math.exp(2.0)
    assert equals.round(decimals=9).abs().tolist() == [0, 4, 4, 4, 0, 1, 2, 3]
    rest = columns([(1.0, 0, 0.95, 0.0)] * 2)
    assert sample(torch.zeros(2, 5000), *rest)[0].tolist() == (reference.uniforms(*rest[4:]) * 4750).long().tolist()


@pytest.mark.parametrize("one", [(0.0, 0, 1.0, 0.0), FILTERS[0], FILTERS[10]])
def test_broken_rows_and_extremes(one):
    big = torch.finfo(torch.float32).max
    logits = seeded(9, 300, dtype=torch.float32)
    logits[1, [17, 200]] = torch.nan
    logits[2, [18, 201]] = torch.inf
    logits[3, 19], logits[3, 20] = torch.inf, torch.nan
    logits[4] = -torch.inf
    logits[5] *= 1e30
    logits[6, 1:] = -big
    logits[7] = big
    logits[8] = torch.finfo(torch.float32).tiny * torch.arange(300)
    rest = columns([one] * 9)
    tokens, logprobs = sample(logits, *rest)
    assert tokens[1:5].tolist() == [17, 18, 20, 0]
    assert logprobs[1:5].isnan().all()
    wanted, expected = reference.sample(logits, *rest)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_a_row_does_not_depend_on_its_neighbours_nor_on_where_it_lies():
    logits = seeded(8, 613, dtype=torch.float32, scale=3.0)
    rest = columns(some_filters(8, 613, seed=1))
    whole = sample(logits, *rest)
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7):
        order = torch.randperm(8, generator=generator)[:size]
        for got, wanted in zip(sample(logits[order], *(one[order] for one in rest)), whole):
            assert torch.equal(got, wanted[order])
    wide = torch.cat([logits, logits], -1)
    for view in (wide[:, :613], logits.t().contiguous().t()):
        for got, wanted in zip(sample(view, *rest), whole):
            assert torch.equal(got, wanted)
    tokens, logprobs = sample(logits[:0], *columns([]))
    assert (tokens.shape, logprobs.shape) == ((0,), (0,))


def test_rows_further_apart_than_two_to_the_31(monkeypatch):
    monkeypatch.undo()
    far = torch.empty(2**31 + 512, dtype=torch.float32)  # virtual memory: only two rows are touched
    logits = far.as_strided((2, 300), (2**31 + 64, 1))
    logits.copy_(seeded(2, 300, dtype=torch.float32))
    rest = columns([FILTERS[10]] * 2)
    for got, wanted in zip(sample(logits, *rest), sample(logits.clone(), *rest)):
        assert torch.equal(got, wanted)
    given = Rows(2, 300).arguments([0, 1])
    assert torch.equal(penalize(logits, *given), penalize(logits.clone(), *given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("count", "vocabulary"), [(1, 1), (3, 7), (9, 60), (3, 4099)])
def test_penalties_equal_the_oracle(dtype, count, vocabulary):
    rows = Rows(count, vocabulary)
    logits = seeded(count, vocabulary, dtype=dtype, scale=3.0)
    logits[:, ::5] = 0.0
    assert torch.equal(penalize(logits, *rows.arguments(list(range(count)))), rows.oracle(logits))
    assert torch.equal(penalize(logits[:1], *rows.arguments([0])), rows.oracle(logits)[:1])


def test_penalties_of_long_histories_and_no_rows():
    rows = Rows(1, 30)
    rows.histories, rows.prompts = [[7, 3, 7] * 500], [1]
    logits = seeded(1, 30, dtype=torch.float32)
    assert torch.equal(penalize(logits, *rows.arguments([0])), rows.oracle(logits))
    assert penalize(logits[:0], *Rows(0, 30).arguments([])).shape == (0, 30)


def test_bad_input_is_one_sentence():
    with pytest.raises(ToolkitError, match=r"sample got dtype torch\.float64"):
        sample(torch.zeros(1, 4, dtype=torch.float64), *columns([FILTERS[0]]))
    with pytest.raises(ToolkitError, match=r"penalize got dtype torch\.float64"):
        penalize(torch.zeros(1, 4, dtype=torch.float64), *Rows(1, 4).arguments([0]))
