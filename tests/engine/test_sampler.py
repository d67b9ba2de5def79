import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from engine_standin import make_request
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from toolkit.engine.params import SamplingParams
from toolkit.engine.sampler import NUCLEUS_GUESS, adjust, beyond_nucleus, draw, process, sample


def scores_of(seed: int, rows: int, vocab: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sequence_of(params: SamplingParams, prompt=(1, 2, 3), output=(), **given):
    sequence = make_request(list(prompt), params, **given).sequences[0]
    sequence.tokens += output
    return sequence


def normalised(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities / probabilities.sum(-1, keepdim=True)


def warped(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The same filters by transformers."""
    scores = scores / params.temperature
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p > 0:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    return scores.softmax(-1)


FILTERS = [
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7),
    SamplingParams(top_k=10**6),
    SamplingParams(top_p=0.1),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.9999),
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=2.0, top_k=50, top_p=0.7, min_p=0.02),
]


@pytest.mark.parametrize("vocab", [2, 61, 997])
def test_filters_keep_what_transformers_keeps(vocab):
    for at, params in enumerate(FILTERS):
        scores = scores_of(at, 20, vocab)
        ours, theirs = normalised(process(scores.clone(), [params] * 20)), warped(scores, params)
        assert torch.equal(ours > 0, theirs > 0), params
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_nucleus_wider_than_the_first_guess():
    vocab = 5 * NUCLEUS_GUESS
    params = SamplingParams(top_p=0.95)
    scores = scores_of(0, 4, vocab, scale=0.1)
    ours = process(scores.clone(), [params] * 4)
    assert int((ours > 0).sum(-1).min()) > NUCLEUS_GUESS
    assert torch.equal(ours > 0, warped(scores, params) > 0)


def test_ties_at_the_edge_of_the_nucleus_go_to_the_lowest_ids():
    probabilities = torch.tensor([[0.1, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1]], dtype=torch.float64)
    kept = [
        (~beyond_nucleus(probabilities, torch.tensor([[p]])))[0].nonzero()[:, 0].tolist()
        for p in (0.05, 0.3, 0.65, 0.75, 1.0)
    ]
    assert kept == [[1], [1, 3], [0, 1, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5, 6]]


def test_draws_follow_the_distribution():
    """Chi-square of 40,000 draws with a fixed seed, for each filter."""
    draws, vocab = 40_000, 23
    rng = np.random.default_rng(5)
    for params in (FILTERS[0], FILTERS[1], FILTERS[3], FILTERS[6], FILTERS[8], FILTERS[10]):
        scores = scores_of(3, 1, vocab, scale=1.0)
        ids, logprobs = draw(scores.repeat(draws, 1), [params] * draws, rng.random(draws).tolist())
        expected = warped(scores, params)[0]
        counts = torch.bincount(ids, minlength=vocab).double()
        assert counts[expected == 0].sum() == 0
        some = expected > 0
        chi2 = ((counts - draws * expected)[some] ** 2 / (draws * expected[some])).sum()
        freedom = int(some.sum()) - 1
        assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 1
        torch.testing.assert_close(
            torch.tensor(logprobs, dtype=torch.float64), expected.log()[ids], rtol=1e-9, atol=1e-9
        )


def test_the_draw_is_the_inverse_of_the_cumulative_distribution():
    scores = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64).log()[None]
    uniforms = [0.0, 0.25, 0.4999, 0.5, 0.7499, 0.75, 1 - 2**-53]
    ids, _ = draw(scores.repeat(len(uniforms), 1), [SamplingParams()] * len(uniforms), uniforms)
    assert ids.tolist() == [0, 0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_never_draw_a_token_without_mass(uniform):
    for seed in range(50):
        scores = scores_of(seed, 1, 37)
        scores[0, :3] = scores[0, -3:] = -torch.inf
        ids, logprobs = draw(scores, [SamplingParams(top_p=0.999)], [uniform])
        assert 3 <= int(ids) < 34
        assert math.isfinite(logprobs[0])


def test_greedy_takes_the_lowest_of_equals_with_certainty():
    logits = torch.zeros(2, 9)
    logits[0, [4, 7]] = 1.0
    drawn = sample(logits, [sequence_of(SamplingParams(temperature=0))] * 2)
    assert drawn.token_ids == [4, 0]
    assert drawn.sampling_logprobs == [0.0, 0.0]
    torch.testing.assert_close(torch.tensor(drawn.logprobs), logits.log_softmax(-1)[[0, 1], [4, 0]])


def test_logprobs_are_the_models_own_whatever_the_filters():
    logits = scores_of(1, 1, 50).float()
    expected = logits.double().log_softmax(-1)[0]
    for params in (*FILTERS, SamplingParams(temperature=0), SamplingParams(repetition_penalty=3.0)):
        drawn = sample(logits, [sequence_of(params)])
        assert abs(drawn.logprobs[0] - expected[drawn.token_ids[0]]) < 1e-5
        assert torch.tensor(drawn.logprobs[0], dtype=torch.float32).item() == drawn.logprobs[0]


def test_penalties_by_hand():
    scores = torch.tensor([2.0, -2.0, 1.0, 0.5, -1.0, 3.0], dtype=torch.float64)
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    adjust(scores, sequence_of(params, prompt=[0, 1], output=[2, 2, 2, 1]))
    # 0, 1 and 2 were seen; 2 came out three times and 1 once.
    assert scores.tolist() == [1.0, -4.0 - 0.5 - 0.25, 0.5 - 1.5 - 0.25, 0.5, -1.0, 3.0]


def test_penalties_reach_greedy_rows_and_the_sampling_distribution():
    logits = torch.tensor([[2.0, 1.9, -9.0]])
    assert sample(logits, [sequence_of(SamplingParams(temperature=0), output=[0])]).token_ids == [0]
    penal = SamplingParams(temperature=0, presence_penalty=1.0)
    assert sample(logits, [sequence_of(penal, output=[0])]).token_ids == [1]
    params = SamplingParams(presence_penalty=1.0, top_k=1)
    drawn = sample(logits, [sequence_of(params, output=[0])])
    assert (drawn.token_ids, drawn.sampling_logprobs) == ([1], [0.0])


def test_min_tokens_bars_every_ending_token():
    logits = torch.zeros(1, 61)
    logits[0, 0] = logits[0, 5] = 50.0
    logits[0, 9] = 1.0
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[5, 1000])
    picks = [sample(logits, [sequence_of(params, output=[9] * n)]).token_ids[0] for n in range(3)]
    assert picks == [9, 9, 0]
    ignoring = SamplingParams(temperature=0, min_tokens=2, ignore_eos=True)
    assert sample(logits, [sequence_of(ignoring)]).token_ids == [0]


def test_top_logprobs_are_the_models_own_best_first():
    logits = scores_of(2, 2, 40).float()
    many = SamplingParams(logprobs=3, temperature=0.1, top_k=1)
    drawn = sample(logits, [sequence_of(many), sequence_of(SamplingParams(logprobs=0))])
    order = logits[0].argsort(descending=True)[:3].tolist()
    assert list(drawn.top_logprobs[0]) == order
    assert drawn.top_logprobs[0][order[0]] == drawn.logprobs[0]
    assert drawn.top_logprobs[1] == {}
    assert sample(logits[:1], [sequence_of(SamplingParams())]).top_logprobs == [None]
    assert len(sample(logits[:1], [sequence_of(SamplingParams(logprobs=99))]).top_logprobs[0]) == 40


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(seed=1),
        SamplingParams(top_p=0.5, top_k=3, min_p=0.1, seed=1),
    ],
)
def test_a_broken_row_fails_alone(bad, params):
    logits = scores_of(4, 3, 30).float()
    clean = sample(logits, [sequence_of(params) for _ in range(3)])
    logits[1, 17] = bad
    drawn = sample(logits, [sequence_of(params) for _ in range(3)])
    assert [error is None for error in drawn.errors] == [True, False, True]
    for row in (0, 2):
        assert drawn.token_ids[row] == clean.token_ids[row]
        assert drawn.sampling_logprobs[row] == clean.sampling_logprobs[row]
    logits[1] = -torch.inf
    assert sample(logits, [sequence_of(params) for _ in range(3)]).errors[1] is not None


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0, 0.5, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 1, 5, 40]),
        top_p=rng.choice([1.0, 1.0, 0.3, 0.9]),
        min_p=rng.choice([0.0, 0.0, 0.1]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        frequency_penalty=rng.choice([0.0, 0.2]),
        min_tokens=rng.choice([0, 3]),
        logprobs=rng.choice([None, 2]),
        seed=rng.randrange(2**32),
    )


@pytest.mark.parametrize("vocab", [61, 1003])
@pytest.mark.parametrize("seed", range(3))
def test_a_row_does_not_depend_on_its_neighbours(seed, vocab):
    """Bit for bit: each row alone against itself in shuffled batches of others, on one and two threads."""
    rng = random.Random(seed)
    rows = 19
    logits = scores_of(seed, rows, vocab).float()
    params = [random_params(rng) for _ in range(rows)]
    outputs = [[rng.randrange(vocab) for _ in range(rng.randrange(6))] for _ in range(rows)]

    def sequences(order):
        return [sequence_of(params[row], output=outputs[row]) for row in order]

    alone = [sample(logits[row : row + 1], sequences([row])) for row in range(rows)]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for _ in range(6):
                order = rng.sample(range(rows), rng.randint(1, rows))
                drawn = sample(logits[order], sequences(order))
                for at, row in enumerate(order):
                    one = alone[row]
                    assert drawn.token_ids[at] == one.token_ids[0]
                    assert drawn.logprobs[at] == one.logprobs[0]
                    assert drawn.sampling_logprobs[at] == one.sampling_logprobs[0]
                    assert drawn.top_logprobs[at] == one.top_logprobs[0]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("vocab", [61, 32_003])
def test_probabilities_of_a_row_have_the_same_bits_anywhere(vocab):
    """32,003 columns are more than one thread's share, and no multiple of a vector."""
    scores = scores_of(9, 7, vocab)
    for params in (
        SamplingParams(temperature=0.7),
        SamplingParams(top_p=0.8),
        SamplingParams(top_k=9, min_p=0.1),
    ):
        together = process(scores.clone(), [params] * 7)
        for row in range(7):
            assert torch.equal(process(scores[row : row + 1].clone(), [params])[0], together[row])
            shifted = torch.cat([torch.zeros(1, vocab, dtype=torch.float64), scores[row:]])
            assert torch.equal(process(shifted, [params] * len(shifted))[1], together[row])


def test_draws_are_a_function_of_seed_and_index():
    logits = torch.zeros(1, 61)

    def tokens(seed, index):
        one = make_request([1], SamplingParams(n=3), seed=seed).sequences[index]
        return [sample(logits, [one]).token_ids[0] for _ in range(40)]

    assert tokens(7, 0) == tokens(7, 0)
    lists = [tuple(tokens(seed, index)) for seed in (7, 8) for index in range(3)]
    assert len(set(lists)) == 6
    assert max(Counter(lists[0]).values()) < 10


def test_bfloat16_logits_are_read_as_float32():
    logits = scores_of(1, 3, 40).bfloat16()
    same = sample(logits.float(), [sequence_of(SamplingParams(seed=1)) for _ in range(3)])
    drawn = sample(logits, [sequence_of(SamplingParams(seed=1)) for _ in range(3)])
    assert (drawn.token_ids, drawn.logprobs) == (same.token_ids, same.logprobs)
