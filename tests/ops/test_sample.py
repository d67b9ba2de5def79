"""sample: the token of a row by a loop over its vocabulary, and that a row's bits depend on that row alone."""

import math

import pytest
import torch

from tests.helpers.implementations import (
    NATIVE,
    REFERENCE,
    TRITON,
    impl_and_dtype,
    implementations,
    only_triton,
)
from tests.helpers.interpreter import far_apart
from tests.helpers.rowwise import check_rows, seeded, threads
from tests.helpers.sampling import FILTERS, columns, oracle, some_filters
from toolkit.errors import ToolkitError
from toolkit.ops.sample import reference, sample


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


def test_every_implementation_takes_the_same_uniform(impl):
    """A boundary put just after the uniform samples the token before it, one just before it the other.

    To 44 bits in float64, to 20 in float32.
    """
    count, near = (12, 2.0**-20) if impl is TRITON else (400, 2.0**-44)
    seeds = torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(1))
    steps = torch.randint(0, 2**62, (count,), generator=torch.Generator().manual_seed(2))
    u = reference.uniforms(seeds, steps).clamp(1e-5, 1 - 1e-5)
    plain = columns([FILTERS[0]] * count)[:4]
    for shift, token in ((near, 0), (-near, 1)):
        boundary = u + shift
        logits = torch.stack([boundary.log(), (-boundary).log1p()], -1).to(impl.dtypes[0])
        assert sample(logits, *plain, seeds, steps, impl=impl.option)[0].tolist() == [token] * count


@impl_and_dtype()
@pytest.mark.parametrize("vocabulary", [1, 2, 61, 255, 256, 257, 997, 8269])
def test_matches_the_oracle(impl, dtype, vocabulary):
    rows = 4 if vocabulary > 1000 else 16 if impl is TRITON else 60
    filters, rest = some_filters(rows, vocabulary), columns(some_filters(rows, vocabulary))
    scale = torch.tensor([3.0, 0.1, 1.0, 30.0]).repeat(rows // 4)[:, None]
    logits = (seeded(rows, vocabulary) * scale).to(dtype)
    logits[5::7, ::3] = -math.inf
    logits[5::7, 0] = 0.0
    logits[6::7] = (logits[6::7] * 2).round()  # ties
    before = logits.clone()
    tokens, logprobs = sample(logits, *rest, impl=impl.option)
    assert torch.equal(logits, before)
    assert (tokens.dtype, logprobs.dtype) == (torch.int64, torch.float64)
    uniforms = reference.uniforms(*rest[4:]).tolist()
    for row in range(rows):
        token, logprob = oracle(logits[row].double().tolist(), *filters[row], uniforms[row])
        assert int(tokens[row]) == token, (row, filters[row])
        assert abs(float(logprobs[row]) - logprob) < 1e-12


def test_sampling_is_the_inverse_of_the_cumulative_distribution(monkeypatch):
    uniforms = torch.tensor([0.0, 0.25, 0.4999, 0.5, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(reference, "uniforms", lambda seeds, steps: uniforms)
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64).log().expand(7, -1)
    tokens, _ = sample(logits, *columns([FILTERS[0]] * 7), impl="reference")
    assert tokens.tolist() == [0, 0, 0, 2, 2, 3, 3]


def test_the_ends_of_the_interval_never_sample_a_token_without_mass(impl, monkeypatch):
    if impl is REFERENCE:
        ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64).repeat(50)
        monkeypatch.setattr(reference, "uniforms", lambda seeds, steps: ends)
        steps = torch.zeros(100, dtype=torch.int64)
    else:  # the steps whose uniforms lie furthest out
        found = reference.uniforms(torch.zeros(2**19, dtype=torch.int64), torch.arange(2**19))
        each = 10 if impl is TRITON else 50
        steps = torch.cat([found.topk(each).indices, found.topk(each, largest=False).indices])
    logits = seeded(len(steps), 37, scale=3.0)
    logits[:, :3] = logits[:, -3:] = -torch.inf
    rest = columns([(1.0, 0, 0.999, 0.0)] * len(steps))
    tokens, logprobs = sample(logits, *rest[:4], torch.zeros_like(steps), steps, impl=impl.option)
    assert int(tokens.min()) >= 3
    assert int(tokens.max()) < 34
    assert logprobs.isfinite().all()


@impl_and_dtype()
def test_greedy_takes_the_lowest_of_equals_with_certainty(impl, dtype):
    logits = torch.zeros(3, 300, dtype=dtype)
    logits[0, [40, 270]] = 1.0
    logits[2, :-1] = -torch.inf
    tokens, logprobs = sample(logits, *columns([(0.0, 3, 0.5, 0.1)] * 3), impl=impl.option)
    assert tokens.tolist() == [40, 0, 299]
    assert logprobs.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("one", [(0.0, 0, 1.0, 0.0), FILTERS[0], FILTERS[6], FILTERS[10]])
def test_a_row_without_a_distribution_gives_nan_and_a_token(impl, one):
    logits = seeded(6, 300, dtype=torch.float32)
    rest = columns([one] * 6)
    clean = sample(logits, *rest, impl=impl.option)
    logits[1, [17, 200]] = torch.nan
    logits[2, [18, 201]] = torch.inf
    logits[3, 19], logits[3, 20] = torch.inf, torch.nan
    logits[4] = -torch.inf
    tokens, logprobs = sample(logits, *rest, impl=impl.option)
    assert tokens[1:5].tolist() == [17, 18, 20, 0]
    assert logprobs[1:5].isnan().all()
    for got, wanted in zip((tokens, logprobs), clean):
        assert torch.equal(got[[0, 5]], wanted[[0, 5]])


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
    tokens, logprobs = sample(logits, *rest, impl=impl.option)
    uniforms = reference.uniforms(*rest[4:]).tolist()
    for row in range(5):
        token, logprob = oracle(logits[row].double().tolist(), *one, uniforms[row])
        assert int(tokens[row]) == token
        assert abs(float(logprobs[row]) - logprob) < 1e-12


@impl_and_dtype([torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [61, 4097, 32_003])
def test_a_row_does_not_depend_on_its_neighbours(impl, dtype, vocabulary):
    vocabulary = min(vocabulary, 613) if impl is TRITON else vocabulary
    logits = seeded(17, vocabulary, dtype=dtype, scale=3.0)
    logits[::5] = (logits[::5] * 4).round() / 40
    rest = columns(some_filters(17, vocabulary))
    check_rows(lambda *given: sample(*given, impl=impl.option), [logits, *rest])


@implementations(NATIVE)
@pytest.mark.usefixtures("impl")
def test_the_same_bits_every_run_on_any_number_of_threads():
    logits = seeded(9, 32_003, dtype=torch.float32)
    rest = columns([(0.8, 0, 0.97, 0.0)] * 9)
    first = sample(logits, *rest)
    for count in (1, 2, 2):
        with threads(count):
            for a, b in zip(sample(logits, *rest), first):
                assert torch.equal(a, b)


@implementations(NATIVE, TRITON)
@pytest.mark.parametrize("vocabulary", [1003, 8192, 50_257])
def test_kernels_sample_what_the_reference_samples(impl, vocabulary):
    rows = 2 if impl is TRITON else 40
    logits = seeded(rows, vocabulary, dtype=torch.float32, scale=2.0)
    rest = columns(some_filters(rows, vocabulary, seed=2), seed=3)
    tokens, logprobs = sample(logits, *rest)
    wanted, expected = sample(logits, *rest, impl="reference")
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logprobs, expected, rtol=1e-11, atol=1e-11)


def test_strided_and_empty_logits(impl):
    base = seeded(8, 90, dtype=torch.float32, scale=2.0)
    rest = columns(some_filters(4, 30, seed=4))

    def both(logits, *given):
        return sample(logits, *given, impl=impl.option)

    for view in (base[::2, 3:33], base[1:5, ::3], base.t()[:4, :8].t()[:4].t()):
        some = [one[: len(view)] for one in rest]
        for got, wanted in zip(both(view, *some), both(view.contiguous(), *some)):
            assert torch.equal(got, wanted)
    narrow = [one.float() if one.is_floating_point() else one for one in rest]
    upcast = [one.to(two.dtype) for one, two in zip(narrow, rest)]
    assert torch.equal(both(base[:4], *narrow)[0], both(base[:4], *upcast)[0])
    tokens, logprobs = both(base[:0], *columns([]))
    assert (tokens.shape, logprobs.shape) == ((0,), (0,))


def test_rows_further_apart_than_two_to_the_31(impl):
    logits, rest = seeded(2, 300, dtype=torch.float32), columns([FILTERS[10]] * 2)
    for got, wanted in zip(sample(far_apart(logits), *rest, impl=impl.option), sample(logits, *rest, impl=impl.option)):
        assert torch.equal(got, wanted)


def test_bad_input_is_named(impl):
    logits, rest = torch.zeros(2, 4), columns([FILTERS[0]] * 2)
    with pytest.raises(ToolkitError, match=r"logits must have shape \[B, V\] with V >= 1, got \[4\]"):
        sample(torch.zeros(4), *rest, impl=impl.option)
    with pytest.raises(ToolkitError, match=r"logits must have shape .* got \[2, 0\]"):
        sample(torch.zeros(2, 0), *rest, impl=impl.option)
    with pytest.raises(ToolkitError, match=r"temperature must have shape \[2\] for logits .*\[2, 4\], got \[1\]"):
        sample(logits, rest[0][:1], *rest[1:], impl=impl.option)
    with pytest.raises(ToolkitError, match=r"seeds must have dtype int64, got torch\.int32"):
        sample(logits, *rest[:4], rest[4].int(), rest[5], impl=impl.option)
    with pytest.raises(ToolkitError, match=r"dtype must be float32.* got torch\.int64"):
        sample(logits.long(), *rest, impl=impl.option)


def test_opcheck():
    inputs = (seeded(3, 8, dtype=torch.float32), *columns(some_filters(3, 8)))
    torch.library.opcheck(torch.ops.toolkit.sample.default, inputs)


# The Triton kernel: the numbers that it computes on the way.
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
@pytest.mark.sweep
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_rows_of_several_parts_sample_what_the_reference_samples(scale, monkeypatch):
    """Equals on both sides of a part's end, a row of one possible token, and rows without a distribution."""
    from toolkit.ops.sample import triton_sample

    monkeypatch.setattr(triton_sample, "MAX_BLOCK", 128)
    logits = seeded(7, 301, dtype=torch.float32, scale=scale)
    logits[1] = (logits[1] * 2).round()
    logits[2, :290] = -0.0
    logits[3, torch.arange(301) != 200] = -torch.inf
    logits[4, 299] = torch.nan
    rest = columns(
        [(1.0, 0, 0.93, 0.0), (1.3, 60, 0.7, 0.0), (1.0, 0, 0.6, 0.0), *[(1.0, 7, 0.9, 0.1)] * 3, (0.0, 1, 0.5, 0.0)]
    )
    tokens, logprobs = sample(logits, *rest)
    wanted, expected = sample(logits, *rest, impl="reference")
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logprobs, expected, rtol=1e-11, atol=1e-11, equal_nan=True)


@only_triton
@pytest.mark.usefixtures("impl")
def test_a_dtype_that_is_named():
    with pytest.raises(ToolkitError, match=r"kernels of sample, got torch\.float64"):
        sample(torch.zeros(1, 4, dtype=torch.float64), *columns([FILTERS[0]]))
