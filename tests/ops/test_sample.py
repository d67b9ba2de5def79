import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.helpers.implementations import only_triton
from tests.helpers.rowwise import check_rows, seeded, threads
from toolkit.errors import ToolkitError
from toolkit.ops.sample import reference, sample

IMPLS = [None, "reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# temperature, top_k, top_p, min_p
FILTERS = [
    (1.0, 0, 1.0, 0.0),
    (0.3, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 7, 1.0, 0.0),
    (1.0, 10**6, 1.0, 0.0),
    (1.0, -1, 0.1, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 0.9999, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.0, 0, 1.0, 1.0),
    (2.0, 50, 0.7, 0.02),
]


def columns(filters: list[tuple[float, int, float, float]], seed: int = 0) -> list[Tensor]:
    """The op's arguments after the logits, a row each, with random seeds and steps."""
    generator = torch.Generator().manual_seed(seed)
    temperature, top_k, top_p, min_p = (list(one) for one in zip(*filters)) if filters else ([], [], [], [])
    return [
        torch.tensor(temperature, dtype=torch.float64),
        torch.tensor(top_k, dtype=torch.int64),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(min_p, dtype=torch.float64),
        torch.randint(-(2**63), 2**63 - 1, (len(filters),), generator=generator),
        torch.randint(0, 2**40, (len(filters),), generator=generator),
    ]


def some_filters(rows: int, vocabulary: int, seed: int = 0) -> list[tuple[float, int, float, float]]:
    generator = torch.Generator().manual_seed(seed)

    def pick(values: list) -> list:
        return [values[i] for i in torch.randint(len(values), (rows,), generator=generator).tolist()]

    return list(
        zip(
            pick([0.0, 0.5, 1.0, 1.7]),
            pick([0, 0, -1, 1, 5, 40, vocabulary - 1, vocabulary]),
            pick([1.0, 1.0, 0.3, 0.9, 0.999, 1e-9]),
            pick([0.0, 0.0, 0.1]),
        )
    )


def probabilities(row: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """The distribution of one row, by sorting; independent of the code under test."""
    best = max(row)
    weights = [math.exp(x / temperature - best / temperature) for x in row]
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if 0 < top_k < len(row):
        order = [i for i in order if row[i] >= row[order[top_k - 1]]]
    if top_p < 1:
        enough = top_p * math.fsum(weights[i] for i in order)
        before = [0.0, *itertools.accumulate(weights[i] for i in order)]
        order = [i for i, mass in zip(order, before) if mass < enough]
    kept = {i for i in order if weights[i] >= min_p}
    total = math.fsum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(row))]


def oracle(row: list[float], temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> tuple[int, float]:
    if temperature == 0:
        return row.index(max(row)), 0.0
    p = probabilities(row, temperature, top_k, top_p, min_p)
    token = next(i for i, mass in enumerate(itertools.accumulate(p)) if mass > u)
    return token, math.log(p[token])


def warped(scores: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The same filters by transformers."""
    scores = scores / temperature
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p > 0:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores.softmax(-1)


def test_philox_gives_the_published_values():
    """The Philox4x32-10 lines of Random123's kat_vectors; the third is of the digits of pi."""
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in known:
        words = reference.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        assert tuple(int(word) for word in words) == expected


def test_uniforms_take_seed_and_step_as_64_bits_low_word_first():
    seeds = torch.tensor([0, -1, (5 << 32) | 7])
    steps = torch.tensor([0, (3 << 32) | 2, 11])
    words = reference.philox(
        tuple(map(torch.tensor, ([0, 2, 11], [0, 3, 0], [0, 0, 0], [0, 0, 0]))),
        tuple(map(torch.tensor, ([0, 0xFFFFFFFF, 7], [0, 0xFFFFFFFF, 5]))),
    )
    expected = [((a << 32 | b) >> 11) / 2**53 for a, b in zip(words[0].tolist(), words[1].tolist())]
    assert reference.uniforms(seeds, steps).tolist() == expected
    assert int(reference.uniforms(seeds, steps)[0] * 2**32) == 0x6627E8D5
    many = reference.uniforms(torch.arange(100_000) % 7, torch.arange(100_000))
    assert float(many.min()) >= 0
    assert float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 4 / math.sqrt(12 * 100_000)
    assert len(many.unique()) == 100_000


@pytest.mark.parametrize("impl", IMPLS)
def test_every_implementation_takes_the_same_uniform(impl):
    """To 44 bits: a boundary put just after the uniform samples the token before it, one just before it the other."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (400,), generator=torch.Generator().manual_seed(1))
    steps = torch.randint(0, 2**62, (400,), generator=torch.Generator().manual_seed(2))
    u = reference.uniforms(seeds, steps).clamp(1e-6, 1 - 1e-6)
    plain = columns([FILTERS[0]] * 400)[:4]
    for shift, token in ((2.0**-44, 0), (-(2.0**-44), 1)):
        boundary = u + shift
        logits = torch.stack([boundary.log(), (-boundary).log1p()], -1)
        assert sample(logits, *plain, seeds, steps, impl=impl)[0].tolist() == [token] * 400


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 61, 255, 256, 257, 997])
def test_matches_the_oracle(impl, dtype, vocabulary):
    rows = 60
    filters, rest = some_filters(rows, vocabulary), columns(some_filters(rows, vocabulary))
    scale = torch.tensor([3.0, 0.1, 1.0, 30.0]).repeat(rows // 4)[:, None]
    logits = (seeded(rows, vocabulary) * scale).to(dtype)
    logits[5::7, ::3] = -math.inf
    logits[5::7, 0] = 0.0
    logits[6::7] = (logits[6::7] * 2).round()  # ties
    before = logits.clone()
    tokens, logprobs = sample(logits, *rest, impl=impl)
    assert torch.equal(logits, before)
    assert (tokens.dtype, logprobs.dtype) == (torch.int64, torch.float64)
    uniforms = reference.uniforms(*rest[4:]).tolist()
    for row in range(rows):
        token, logprob = oracle(logits[row].double().tolist(), *filters[row], uniforms[row])
        assert int(tokens[row]) == token, (row, filters[row])
        assert abs(float(logprobs[row]) - logprob) < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocabulary", [2, 61, 997, 8192])
def test_filters_keep_what_transformers_keeps(impl, vocabulary):
    """A token's probability is its weight by the sum of the weights kept, so it tells the set."""
    for at, one in enumerate(FILTERS):
        logits = seeded(20, vocabulary, scale=3.0, seed=at)
        tokens, logprobs = sample(logits, *columns([one] * 20, seed=at), impl=impl)
        theirs = warped(logits, *one).gather(1, tokens[:, None])[:, 0].log()
        torch.testing.assert_close(logprobs, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 0.1])
def test_nuclei_of_flat_distributions(impl, scale):
    logits = seeded(4, 5000, scale=scale)
    rest = columns([(1.0, 0, 0.95, 0.0)] * 4)
    tokens, logprobs = sample(logits, *rest, impl=impl)
    if scale == 0:
        assert tokens.tolist() == (reference.uniforms(*rest[4:]) * 4750).long().tolist()
        torch.testing.assert_close(logprobs, torch.full((4,), -math.log(4750), dtype=torch.float64))
    else:
        theirs = warped(logits, 1.0, 0, 0.95, 0.0).gather(1, tokens[:, None])[:, 0].log()
        torch.testing.assert_close(logprobs, theirs, rtol=1e-12, atol=1e-12)


def sampled(logits: Tensor, one: tuple[float, int, float, float], impl: str | None, count: int = 600) -> list[int]:
    """The distinct tokens of many samples from one row."""
    rest = columns([one] * count)
    return sorted(set(sample(logits.expand(count, -1), *rest, impl=impl)[0].tolist()))


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_at_the_edge_of_the_nucleus_go_to_the_lowest_ids(impl):
    logits = torch.tensor([0.1, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1], dtype=torch.float64).log()
    kept = [sampled(logits, (1.0, 0, p, 0.0), impl) for p in (0.05, 0.3, 0.65, 0.75, 1.0)]
    assert kept == [[1], [1, 3], [0, 1, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5, 6]]
    many = logits.repeat(60)  # more equals than are sorted at a time; each of the most probable has 1/300
    first = [i for i in range(420) if i % 7 % 2][:18]
    assert sampled(many, (1.0, 0, 0.0599, 0.0), impl) == first


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_at_the_kth_value_are_kept(impl):
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0, -1.0])
    assert [sampled(logits, (1.0, k, 1.0, 0.0), impl) for k in (1, 2, 3, 4, 5)] == [
        [1], [1, 2, 3, 5], [1, 2, 3, 5], [1, 2, 3, 5], [0, 1, 2, 3, 5],
    ]  # fmt: skip
    assert sampled(torch.tensor([-0.0, 0.0, -1.0]), (1.0, 1, 1.0, 0.0), impl) == [0, 1]
    assert sampled(torch.tensor([-math.inf, 0.0, -math.inf, 1.0]), (1.0, 3, 1.0, 0.0), impl) == [1, 3]


@pytest.mark.parametrize("impl", IMPLS)
def test_the_most_probable_token_is_always_in(impl):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 2.0])
    assert sampled(logits, (1.0, 0, 0.0, 0.0), impl) == [2]
    assert sampled(logits, (1.0, 3, 0.0, 0.0), impl) == [2]
    assert sampled(logits, (1.0, 0, 1.0, 2.0), impl) == [2, 4]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("one", [FILTERS[at] for at in (0, 1, 3, 6, 8, 10)])
def test_samples_follow_the_distribution(impl, one):
    """Chi-square of 40,000 samples of one seed, a step each."""
    samples, vocabulary = 40_000, 23
    logits = seeded(1, vocabulary, seed=3)
    temperature, top_k, top_p, min_p, _, _ = columns([one] * samples)
    seeds, steps = torch.full((samples,), 5), torch.arange(samples)
    tokens, _ = sample(logits.expand(samples, -1), temperature, top_k, top_p, min_p, seeds, steps, impl=impl)
    expected = warped(logits, *one)[0]
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    chi2 = ((counts - samples * expected)[some] ** 2 / (samples * expected[some])).sum()
    freedom = int(some.sum()) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 1


def test_sampling_is_the_inverse_of_the_cumulative_distribution(monkeypatch):
    uniforms = torch.tensor([0.0, 0.25, 0.4999, 0.5, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(reference, "uniforms", lambda seeds, steps: uniforms)
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64).log().expand(7, -1)
    tokens, _ = sample(logits, *columns([FILTERS[0]] * 7), impl="reference")
    assert tokens.tolist() == [0, 0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("impl", IMPLS)
def test_the_ends_of_the_interval_never_sample_a_token_without_mass(impl, monkeypatch):
    if impl == "reference":
        ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64).repeat(50)
        monkeypatch.setattr(reference, "uniforms", lambda seeds, steps: ends)
        steps = torch.zeros(100, dtype=torch.int64)
    else:  # the steps whose uniforms lie furthest out
        found = reference.uniforms(torch.zeros(2**19, dtype=torch.int64), torch.arange(2**19))
        steps = torch.cat([found.topk(50).indices, found.topk(50, largest=False).indices])
    logits = seeded(100, 37, scale=3.0)
    logits[:, :3] = logits[:, -3:] = -torch.inf
    rest = columns([(1.0, 0, 0.999, 0.0)] * 100)
    tokens, logprobs = sample(logits, *rest[:4], torch.zeros_like(steps), steps, impl=impl)
    assert int(tokens.min()) >= 3
    assert int(tokens.max()) < 34
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_takes_the_lowest_of_equals_with_certainty(impl, dtype):
    logits = torch.zeros(3, 300, dtype=dtype)
    logits[0, [40, 270]] = 1.0
    logits[2, :-1] = -torch.inf
    tokens, logprobs = sample(logits, *columns([(0.0, 3, 0.5, 0.1)] * 3), impl=impl)
    assert tokens.tolist() == [40, 0, 299]
    assert logprobs.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("one", [(0.0, 0, 1.0, 0.0), FILTERS[0], FILTERS[6], FILTERS[10]])
def test_a_row_without_a_distribution_gives_nan_and_a_token(impl, one):
    logits = seeded(6, 300, dtype=torch.float32)
    rest = columns([one] * 6)
    clean = sample(logits, *rest, impl=impl)
    logits[1, [17, 200]] = torch.nan
    logits[2, [18, 201]] = torch.inf
    logits[3, 19], logits[3, 20] = torch.inf, torch.nan
    logits[4] = -torch.inf
    tokens, logprobs = sample(logits, *rest, impl=impl)
    assert tokens[1:5].tolist() == [17, 18, 20, 0]
    assert logprobs[1:5].isnan().all()
    for got, wanted in zip((tokens, logprobs), clean):
        assert torch.equal(got[[0, 5]], wanted[[0, 5]])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("one", [FILTERS[0], FILTERS[6], FILTERS[10], (1e-5, 5, 0.9, 0.0), (1e300, 0, 0.9, 0.1)])
def test_extreme_values(impl, one):
    big = torch.finfo(torch.float32).max
    logits = seeded(5, 400, dtype=torch.float32)
    logits[0] *= 1e30
    logits[1, 1:] = -big
    logits[2] = big
    logits[3] = -big
    logits[4] = torch.finfo(torch.float32).tiny * torch.arange(400)
    rest = columns([one] * 5)
    tokens, logprobs = sample(logits, *rest, impl=impl)
    uniforms = reference.uniforms(*rest[4:]).tolist()
    for row in range(5):
        token, logprob = oracle(logits[row].double().tolist(), *one, uniforms[row])
        assert int(tokens[row]) == token
        assert abs(float(logprobs[row]) - logprob) < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocabulary", [61, 4097, 32_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_does_not_depend_on_its_neighbours(impl, vocabulary, dtype):
    logits = seeded(17, vocabulary, dtype=dtype, scale=3.0)
    logits[::5] = (logits[::5] * 4).round() / 40
    rest = columns(some_filters(17, vocabulary))
    check_rows(lambda *given: sample(*given, impl=impl), [logits, *rest])


def test_the_same_bits_every_run_on_any_number_of_threads():
    logits = seeded(9, 32_003, dtype=torch.float32)
    rest = columns([(0.8, 0, 0.97, 0.0)] * 9)
    first = sample(logits, *rest)
    for count in (1, 2, 2):
        with threads(count):
            for a, b in zip(sample(logits, *rest), first):
                assert torch.equal(a, b)


@pytest.mark.parametrize("vocabulary", [1003, 8192, 50_257])
def test_native_and_reference_sample_the_same(vocabulary):
    logits = seeded(40, vocabulary, dtype=torch.float32, scale=2.0)
    rest = columns(some_filters(40, vocabulary, seed=2), seed=3)
    tokens, logprobs = sample(logits, *rest)
    wanted, expected = sample(logits, *rest, impl="reference")
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logprobs, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_and_empty_logits(impl):
    base = seeded(8, 90, dtype=torch.float32, scale=2.0)
    rest = columns(some_filters(4, 30, seed=4))
    for view in (base[::2, 3:33], base[1:5, ::3], base.t()[:4, :8].t()[:4].t()):
        some = [one[: len(view)] for one in rest]
        for got, wanted in zip(sample(view, *some, impl=impl), sample(view.contiguous(), *some, impl=impl)):
            assert torch.equal(got, wanted)
    narrow = [one.float() if one.is_floating_point() else one for one in rest]
    tokens, _ = sample(base[:4], *narrow, impl=impl)
    assert torch.equal(tokens, sample(base[:4], *(one.to(two.dtype) for one, two in zip(narrow, rest)), impl=impl)[0])
    tokens, logprobs = sample(base[:0], *columns([]), impl=impl)
    assert (tokens.shape, logprobs.shape) == ((0,), (0,))


def test_rows_further_apart_than_two_to_the_31():
    far = torch.empty(2**31 + 512, dtype=torch.float32)  # virtual memory: only two rows are touched
    logits = far.as_strided((2, 300), (2**31 + 64, 1))
    logits.copy_(seeded(2, 300, dtype=torch.float32))
    rest = columns([FILTERS[10]] * 2)
    for got, wanted in zip(sample(logits, *rest), sample(logits.clone(), *rest)):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_input_is_named(impl):
    logits, rest = torch.zeros(2, 4), columns([FILTERS[0]] * 2)
    with pytest.raises(ToolkitError, match=r"logits must have shape \[B, V\] with V >= 1, got \[4\]"):
        sample(torch.zeros(4), *rest, impl=impl)
    with pytest.raises(ToolkitError, match=r"logits must have shape .* got \[2, 0\]"):
        sample(torch.zeros(2, 0), *rest, impl=impl)
    with pytest.raises(ToolkitError, match=r"temperature must have shape \[2\] for logits .*\[2, 4\], got \[1\]"):
        sample(logits, rest[0][:1], *rest[1:], impl=impl)
    with pytest.raises(ToolkitError, match=r"seeds must have dtype int64, got torch\.int32"):
        sample(logits, *rest[:4], rest[4].int(), rest[5], impl=impl)
    with pytest.raises(ToolkitError, match=r"dtype must be float32.* got torch\.int64"):
        sample(logits.long(), *rest, impl=impl)


def test_opcheck():
    inputs = (seeded(3, 8, dtype=torch.float32), *columns(some_filters(3, 8)))
    torch.library.opcheck(torch.ops.toolkit.sample.default, inputs)


# The Triton launchers: their tiles, splits and limits.
launch_sample = torch.ops.toolkit.sample


@only_triton
@pytest.mark.usefixtures("impl")
def test_philox_and_uniforms_are_those_of_the_specification():
    from tests.helpers.sample_kernels import philox_words, store_uniform

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


@only_triton
@pytest.mark.usefixtures("impl")
def test_keys_order_floats_and_give_them_back():
    from tests.helpers.sample_kernels import store_keys

    big, nan = torch.finfo(torch.float32).max, torch.nan
    values = torch.tensor([-torch.inf, -big, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, big, torch.inf, *[nan, -nan] * 3])
    keys, back = torch.zeros(16, dtype=torch.int32), torch.zeros(16)
    store_keys[(1,)](values, keys, back, SIZE=16)
    assert keys.tolist() == sorted(keys.tolist())
    assert len(set(keys.tolist())) == 10
    assert keys[4] == keys[5] == 0
    assert torch.equal(back[:10], values[:10])
    assert back[10:].isnan().all()


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 1), (8, 2), (16, 61), (12, 513), (3, 8269)])
def test_matches_the_oracle_and_the_specification(dtype, rows, vocabulary):
    from toolkit.ops.sample.triton import MAX_BLOCK

    assert vocabulary < 1000 or vocabulary == 2 * MAX_BLOCK + 77
    filters, rest = some_filters(rows, vocabulary), columns(some_filters(rows, vocabulary))
    logits = (seeded(rows, vocabulary) * torch.tensor([3.0, 0.1, 1.0, 30.0]).repeat(8)[:rows, None]).to(dtype)
    logits[5::7, ::3] = -torch.inf
    logits[5::7, 0] = 0.0
    logits[6::7] = (logits[6::7] * 2).round()
    tokens, logprobs = launch_sample(logits, *rest)
    wanted, expected = reference.sample(logits, *rest)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
    uniforms = reference.uniforms(*rest[4:]).tolist()
    for row in range(rows):
        token, logprob = oracle(logits[row].double().tolist(), *filters[row], uniforms[row])
        assert int(tokens[row]) == token, (row, filters[row])
        assert abs(float(logprobs[row]) - logprob) < 1e-12


@only_triton
@pytest.mark.usefixtures("impl")
def test_ties():
    """A log-probability is over the sum of what is kept, so one sample tells how many equals are in."""
    logits = torch.tensor([2.0, -0.0, 0.0, 0.0, 0.0, -9.0]).expand(8, -1)  # 2 has 0.65 of the mass, a 0 has 0.088
    edges = [(1.0, k, 1.0, 0.0) for k in (1, 2, 4, 5)] + [(1.0, 0, p, 0.0) for p in (0.0, 0.7, 0.8, 0.9)]
    rest = columns(edges)
    tokens, logprobs = launch_sample(logits, *rest)
    weights = torch.where(tokens == 0, 2.0, 0.0).double().exp()
    equals = weights / logprobs.exp() - math.exp(2.0)
    assert equals.round(decimals=9).abs().tolist() == [0, 4, 4, 4, 0, 1, 2, 3]
    rest = columns([(1.0, 0, 0.95, 0.0)] * 2)
    assert (
        launch_sample(torch.zeros(2, 5000), *rest)[0].tolist() == (reference.uniforms(*rest[4:]) * 4750).long().tolist()
    )


@only_triton
@pytest.mark.usefixtures("impl")
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
    tokens, logprobs = launch_sample(logits, *rest)
    assert tokens[1:5].tolist() == [17, 18, 20, 0]
    assert logprobs[1:5].isnan().all()
    wanted, expected = reference.sample(logits, *rest)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@only_triton
@pytest.mark.usefixtures("impl")
def test_a_row_does_not_depend_on_its_neighbours_nor_on_where_it_lies():
    logits = seeded(8, 613, dtype=torch.float32, scale=3.0)
    rest = columns(some_filters(8, 613, seed=1))
    whole = launch_sample(logits, *rest)
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7):
        order = torch.randperm(8, generator=generator)[:size]
        for got, wanted in zip(launch_sample(logits[order], *(one[order] for one in rest)), whole):
            assert torch.equal(got, wanted[order])
    joined = torch.cat([logits, logits], -1)
    for view in (joined[:, :613], logits.t().contiguous().t()):
        for got, wanted in zip(launch_sample(view, *rest), whole):
            assert torch.equal(got, wanted)
    tokens, logprobs = launch_sample(logits[:0], *columns([]))
    assert (tokens.shape, logprobs.shape) == ((0,), (0,))


@only_triton
@pytest.mark.usefixtures("impl")
def test_rows_further_apart_than_two_to_the_31_of_triton():
    far = torch.empty(2**31 + 512, dtype=torch.float32)  # virtual memory: only two rows are touched
    logits = far.as_strided((2, 300), (2**31 + 64, 1))
    logits.copy_(seeded(2, 300, dtype=torch.float32))
    rest = columns([FILTERS[10]] * 2)
    for got, wanted in zip(launch_sample(logits, *rest), launch_sample(logits.clone(), *rest)):
        assert torch.equal(got, wanted)


@only_triton
@pytest.mark.usefixtures("impl")
def test_bad_input_is_one_sentence():
    with pytest.raises(ToolkitError, match=r"kernels of sample, got torch\.float64"):
        launch_sample(torch.zeros(1, 4, dtype=torch.float64), *columns([FILTERS[0]]))
