import random
from collections import Counter

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.helpers.engine_standin import EOS, make_request
from toolkit.engine.params import SamplingParams
from toolkit.engine.request import completion_seed
from toolkit.engine.sampler import Sampler
from toolkit.ops.sample.reference import uniforms


def sample(logits, sequences):
    """One batch by a new sampler."""
    return Sampler().sample(logits, sequences)


def scores_of(seed: int, rows: int, vocab: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sequence_of(params: SamplingParams, prompt=(1, 2, 3), output=(), **given):
    sequence = make_request(list(prompt), params, **given).sequences[0]
    sequence.tokens += output
    return sequence


FILTERS = [
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7),
    SamplingParams(top_k=10**30),
    SamplingParams(top_p=0.1),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.9999),
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=2.0, top_k=50, top_p=0.7, min_p=0.02),
]


@pytest.mark.parametrize("params", FILTERS)
def test_parameters_shape_the_sampling_distribution(params):
    """200 steps of one sequence: its tokens' log-probabilities are those that transformers' filters give."""
    logits = scores_of(3, 1, 61, scale=1.0).float()
    scores = logits.double() / params.temperature
    if 0 < params.top_k < 61:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p > 0:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    expected = scores.log_softmax(-1)[0]
    sequence, sampler = sequence_of(params, seed=5), Sampler()
    for _ in range(200):
        sampled = sampler.sample(logits, [sequence])
        assert sampled.errors == [None]
        assert abs(sampled.sampling_logprobs[0] - float(expected[sampled.token_ids[0]])) < 1e-9
        sequence.tokens.append(sampled.token_ids[0])
    assert (len(set(sequence.tokens[3:])) > 1) == (int(expected.isfinite().sum()) > 1)


def test_greedy_takes_the_lowest_of_equals_with_certainty():
    logits = torch.zeros(2, 9)
    logits[0, [4, 7]] = 1.0
    sampled = sample(logits, [sequence_of(SamplingParams(temperature=0))] * 2)
    assert sampled.token_ids == [4, 0]
    assert sampled.sampling_logprobs == [0.0, 0.0]
    torch.testing.assert_close(torch.tensor(sampled.logprobs), logits.log_softmax(-1)[[0, 1], [4, 0]])


def test_logprobs_are_the_models_own_whatever_the_filters():
    logits = scores_of(1, 1, 50).float()
    expected = logits.double().log_softmax(-1)[0]
    for params in (*FILTERS, SamplingParams(temperature=0), SamplingParams(repetition_penalty=3.0)):
        sampled = sample(logits, [sequence_of(params)])
        assert abs(sampled.logprobs[0] - expected[sampled.token_ids[0]]) < 1e-5
        assert torch.tensor(sampled.logprobs[0], dtype=torch.float32).item() == sampled.logprobs[0]


def test_penalties_by_hand():
    """0, 1 and 2 were seen; 2 came out three times and 1 once. What is sampled from shows the logits after that."""
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5, -1.0, 3.0]])
    adjusted = torch.tensor([1.0, -4.0 - 0.5 - 0.25, 0.5 - 1.5 - 0.25, 0.5, -1.0, 3.0])
    expected = adjusted.double().log_softmax(-1)
    found = {}
    for seed in range(400):
        params = SamplingParams(
            repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, temperature=1.0, seed=seed
        )
        plain = sequence_of(SamplingParams(seed=seed), prompt=[0, 1], output=[2])
        penalised = sequence_of(params, prompt=[0, 1], output=[2, 2, 2, 1])
        sampled = sample(logits.repeat(3, 1), [plain, penalised, plain])
        found[sampled.token_ids[1]] = sampled.sampling_logprobs[1]
        for row in (0, 2):  # the penalties stay in their row
            own = logits[0].double().log_softmax(-1)[sampled.token_ids[row]]
            assert abs(sampled.sampling_logprobs[row] - float(own)) < 1e-9
    assert len(found) >= 5
    for token, value in found.items():
        assert abs(value - float(expected[token])) < 1e-6


def test_penalties_follow_a_sequence_as_it_grows():
    """A sampler that has seen every step samples what a new one does."""
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.3, presence_penalty=0.2, seed=3, min_tokens=4)
    one, other, kept = sequence_of(params), sequence_of(SamplingParams(seed=4)), Sampler()
    for step in range(60):
        logits = scores_of(step, 2, 61).float()
        sampled = kept.sample(logits, [one, other])
        assert sampled == sample(logits, [one, other])
        assert step >= 4 or sampled.token_ids[0] != EOS
        for at, sequence in enumerate((one, other)):
            sequence.tokens.append(sampled.token_ids[at])


def test_parameters_are_made_into_tensors_once_per_batch():
    sequences = [sequence_of(SamplingParams(seed=seed, temperature=seed)) for seed in range(3)]
    sampler, logits = Sampler(), scores_of(0, 3, 61).float()
    sampler.sample(logits, sequences)
    first = sampler._batch_params
    for sequence in sequences:
        sequence.tokens.append(7)
    sampler.sample(logits, list(sequences))
    assert sampler._batch_params is first
    for others in (sequences[::-1], sequences[:2], [*sequences[:2], sequence_of(SamplingParams())]):
        assert sampler.sample(logits[: len(others)], others) == sample(logits[: len(others)], others)
        assert sampler._batch_params is not first


def test_penalties_apply_to_greedy_rows_and_the_sampling_distribution():
    logits = torch.tensor([[2.0, 1.9, -9.0]])
    assert sample(logits, [sequence_of(SamplingParams(temperature=0), output=[0])]).token_ids == [0]
    penal = SamplingParams(temperature=0, presence_penalty=1.0)
    assert sample(logits, [sequence_of(penal, output=[0])]).token_ids == [1]
    params = SamplingParams(presence_penalty=1.0, top_k=1)
    sampled = sample(logits, [sequence_of(params, output=[0])])
    assert (sampled.token_ids, sampled.sampling_logprobs) == ([1], [0.0])


def test_min_tokens_bars_every_ending_token():
    logits = torch.zeros(1, 61)
    logits[0, 0] = logits[0, 5] = 50.0
    logits[0, 9] = 1.0
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[5, 1000])
    picks = [sample(logits, [sequence_of(params, output=[9] * n)]).token_ids[0] for n in range(3)]
    assert picks == [9, 9, 0]
    huge = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[5, 10**30])
    assert sample(logits, [sequence_of(huge)]).token_ids == [9]
    ignoring = SamplingParams(temperature=0, min_tokens=2, ignore_eos=True)
    assert sample(logits, [sequence_of(ignoring)]).token_ids == [0]


def test_top_logprobs_are_the_models_own_best_first():
    logits = scores_of(2, 2, 40).float()
    many = SamplingParams(logprobs=3, temperature=0.1, top_k=1)
    sampled = sample(logits, [sequence_of(many), sequence_of(SamplingParams(logprobs=0))])
    order = logits[0].argsort(descending=True)[:3].tolist()
    assert list(sampled.top_logprobs[0]) == order
    assert sampled.top_logprobs[0][order[0]] == sampled.logprobs[0]
    assert sampled.top_logprobs[1] == {}
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
    sampled = sample(logits, [sequence_of(params) for _ in range(3)])
    assert [error is None for error in sampled.errors] == [True, False, True]
    for row in (0, 2):
        assert sampled.token_ids[row] == clean.token_ids[row]
        assert sampled.sampling_logprobs[row] == clean.sampling_logprobs[row]
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
                sampled = sample(logits[order], sequences(order))
                for at, row in enumerate(order):
                    one = alone[row]
                    assert sampled.token_ids[at] == one.token_ids[0]
                    assert sampled.logprobs[at] == one.logprobs[0]
                    assert sampled.sampling_logprobs[at] == one.sampling_logprobs[0]
                    assert sampled.top_logprobs[at] == one.top_logprobs[0]
    finally:
        torch.set_num_threads(threads)


def test_samples_are_a_function_of_seed_and_index():
    logits = torch.zeros(1, 61)

    def tokens(seed, index):
        one = make_request([1], SamplingParams(n=3), seed=seed).sequences[index]
        for _ in range(40):
            one.tokens += sample(logits, [one]).token_ids
        return one.tokens[1:]

    assert tokens(7, 0) == tokens(7, 0)
    lists = [tuple(tokens(seed, index)) for seed in (7, 8) for index in range(3)]
    assert len(set(lists)) == 6
    assert max(Counter(lists[0]).values()) < 10


def test_a_sample_depends_on_the_number_of_tokens_not_on_how_the_sequence_got_there():
    """So a preempted sequence continues as it would have; and the first completion's seed is the request's own."""
    logits, params = torch.zeros(1, 61), SamplingParams(seed=11)
    grown, at_once = sequence_of(params), sequence_of(params, output=[5, 6, 7])
    for token in (5, 6, 7):
        sample(logits, [grown])
        grown.tokens.append(token)
    assert sample(logits, [grown]) == sample(logits, [at_once])
    token = int(float(uniforms(torch.tensor([11]), torch.tensor([3]))) * 61)
    assert sample(logits, [grown]).token_ids == [token]


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1, 2**63, 2**64 - 1])
def test_seeds_of_completions_are_distinct_64_bit_words(seed):
    seeds = [completion_seed(seed, index) for index in range(1000)]
    assert len(set(seeds)) == 1000
    assert seeds[0] % 2**64 == seed % 2**64
    assert all(-(2**63) <= one < 2**63 for one in seeds)
    assert torch.tensor(seeds).dtype == torch.int64


def test_bfloat16_logits_are_read_as_float32():
    logits = scores_of(1, 3, 40).bfloat16()
    same = sample(logits.float(), [sequence_of(SamplingParams(seed=1)) for _ in range(3)])
    sampled = sample(logits, [sequence_of(SamplingParams(seed=1)) for _ in range(3)])
    assert (sampled.token_ids, sampled.logprobs) == (same.token_ids, same.logprobs)
