"""``best_of``: the best of several candidates, which are those of ``n`` with the same seed."""

import dataclasses

import pytest

from tests.helpers.engine_standin import HistoryModel
from toolkit.engine import AsyncEngine, Engine, SamplingParams
from toolkit.errors import ToolkitError


def engine_of(**given):
    return Engine(HistoryModel(), **{"max_num_seqs": 8, "block_size": 4, **given})


def mean(completion):
    return sum(completion.logprobs) / len(completion.logprobs)


@pytest.mark.parametrize("settings", [{}, {"num_blocks": 14}, {"max_num_seqs": 2}, {"max_num_batched_tokens": 5}])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_are_those_of_all_candidates(settings, seed):
    prompts, params = [[1, 2, 3, 4, 5], [6, 7]], SamplingParams(n=6, max_tokens=9, seed=seed, logprobs=1)
    everything = engine_of().generate(prompts, params)
    engine = engine_of(**settings)
    found = engine.generate(prompts, dataclasses.replace(params, n=2, best_of=6))
    engine.check_integrity()
    expected = []
    for prompt in range(2):
        candidates = sorted((one for one in everything if one.prompt_index == prompt), key=mean, reverse=True)
        expected += [dataclasses.replace(one, index=index) for index, one in enumerate(candidates[:2])]
    assert found == [dataclasses.replace(one, request_id=mine.request_id) for one, mine in zip(expected, found)]
    assert {one.token_ids == two.token_ids for one, two in zip(found, everything)} != {True}


def test_the_prompt_is_computed_once():
    engine = engine_of(enable_prefix_caching=False)
    engine.generate([[1, 2, 3, 4, 5, 6, 7, 8]], SamplingParams(best_of=5, max_tokens=1))
    (batch,) = engine.backend.batches
    assert batch.tokens.tolist()[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert int(batch.query_offsets[-1]) == 8


def test_deltas_come_when_all_candidates_have_finished():
    params = SamplingParams(n=2, best_of=4, max_tokens=6, seed=5)
    engine = engine_of()
    expected = engine.generate([[1, 2]], params)
    engine.submit([1, 2], params)
    steps = [engine.step() for _ in range(6)]
    first = next(deltas for deltas in steps if deltas)
    assert [delta.finished.token_ids for delta in first] == [one.token_ids for one in expected]
    assert [delta.token_ids for delta in first] == [one.token_ids for one in expected]
    assert sum(map(len, steps)) == 2
    assert not engine.has_work


def test_cancelled_candidates_are_chosen_among_too():
    engine = engine_of()
    request = engine.submit([1, 2], SamplingParams(n=1, best_of=3, max_tokens=50, ignore_eos=True))
    engine.step()
    engine.step()
    assert engine.cancel(request)
    (delta,) = engine.step()
    assert delta.finished.finish_reason == "cancelled"
    assert len(delta.finished.token_ids) == 2


def test_the_thread_counts_candidates_and_returns_the_best():
    params = SamplingParams(n=2, best_of=4, max_tokens=6, seed=5)
    expected = engine_of().generate([[1, 2]], params)
    with AsyncEngine(engine_of(), max_queued_seqs=4) as engine:
        assert [one.token_ids for one in engine.generate([[1, 2]], params)] == [one.token_ids for one in expected]
        assert engine._num_queued == 0
        with pytest.raises(ToolkitError, match=r"must have <= 4 sequences, got 5"):
            engine.submit([1, 2], dataclasses.replace(params, best_of=5))
        with pytest.raises(ToolkitError, match=r"best_of must be 2 \(n\) or None in a stream, got 4"):
            engine.stream([1, 2], params)
    with pytest.raises(ToolkitError, match=r"best_of must be 2 \(n\) or None in a stream, got 4"):
        engine_of().stream([1, 2], [params])


@pytest.mark.parametrize("best_of", [1, 0, 2.5])
def test_there_are_at_least_as_many_candidates_as_completions(best_of):
    with pytest.raises(ToolkitError, match=r"best_of must be an integer >= 2 and <= 16384, or None for n, got"):
        SamplingParams(n=2, best_of=best_of)
