"""Prompts that nothing is sampled after (``max_tokens=0``), and what of a prompt was found in the prefix cache."""

import random

import pytest

from tests.engine.test_speculation import VOCABULARY, engine_of
from tests.helpers.engine_standin import POISON, HistoryModel
from tests.helpers.engine_tokenizers import byte_level
from toolkit import LLM, AsyncEngine, Engine
from toolkit.engine.params import SamplingParams
from toolkit.testing.models import random_model


def scored(count, **fields):
    return SamplingParams(max_tokens=0, prompt_logprobs=count, **fields)


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_a_prompt_is_scored_as_it_is_when_something_follows(family):
    model, chance = random_model(family, layers=2, vocabulary=VOCABULARY), random.Random(3)
    prompts = [[chance.randrange(VOCABULARY) for _ in range(length)] for length in (1, 2, 17, 40)]
    with engine_of(model) as engine:
        expected = engine.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=2, ignore_eos=True))
    for settings in ({}, {"max_num_batched_tokens": 7, "num_blocks": 17}, {"speculative_config": {"method": "ngram"}}):
        with engine_of(model, **settings) as engine:
            for _ in range(2):
                found = engine.generate(prompts, scored(2))
                engine.check_integrity()
                assert [one.prompt_logprobs for one in found] == [one.prompt_logprobs for one in expected]
                assert {(tuple(one.token_ids), one.text, one.finish_reason) for one in found} == {((), "", "length")}
                assert engine.stats()["generation_tokens"] == 0


def test_prompts_that_are_scored_beside_others_change_no_token():
    prompts = [[5, 6, 7, 8], [9], [5, 6, 7, 11], [12, 13]]
    params = SamplingParams(max_tokens=5, seed=2, n=2)
    with Engine(HistoryModel(), num_blocks=60, block_size=4) as engine:
        alone = engine.generate(prompts, params)
        mixed = engine.generate([*prompts, *prompts], [params] * 4 + [scored(0, n=2)] * 4)
    assert [one.token_ids for one in mixed if one.prompt_index < 4] == [one.token_ids for one in alone]
    rest = [(one.prompt_index, one.index) for one in mixed if not one.token_ids]
    assert rest == [(at, index) for at in range(4, 8) for index in range(2)]


def test_no_logits_behind_the_prompt_are_looked_at():
    with Engine(HistoryModel(), num_blocks=60) as engine:
        (found,) = engine.generate([[5, POISON]], SamplingParams(max_tokens=0))
        (other,) = engine.generate([[5, POISON]], SamplingParams(max_tokens=1))
    assert (found.finish_reason, other.finish_reason) == ("length", "error")


def test_the_one_delta_has_the_log_probabilities():
    with AsyncEngine(Engine(HistoryModel(), num_blocks=60)) as engine:
        deltas = list(engine.stream([[5, 6, 7]], scored(1, n=2)))
    assert [(delta.token_ids, delta.finished is not None) for delta in deltas] == [([], True)] * 2
    assert all(delta.prompt_logprobs == delta.finished.prompt_logprobs for delta in deltas)
    assert [len(delta.prompt_logprobs) for delta in deltas] == [3, 3]


def test_a_scored_prompt_leaves_a_prefix_and_takes_one_without_log_probabilities():
    prompt = list(range(1, 41))
    with Engine(HistoryModel(), num_blocks=60, block_size=4) as engine:
        found = [
            engine.generate([prompt], params)[0].num_cached_tokens
            for params in (scored(0), SamplingParams(max_tokens=0), SamplingParams(max_tokens=1), scored(0))
        ]
        assert found == [0, 36, 36, 0]
        assert engine.stats()["prefix_cache_hits"] == 72


def test_cached_tokens_are_those_of_the_first_time_that_a_sequence_runs():
    prompt = list(range(1, 31))
    with Engine(HistoryModel(), num_blocks=60, block_size=4) as engine:
        engine.generate([prompt[:9]], SamplingParams(max_tokens=1))
        engine.submit(prompt, SamplingParams(max_tokens=9, n=2, ignore_eos=True))
        finished = []
        for at in range(20):
            finished += [delta.finished for delta in engine.step() if delta.finished]
            if at == 4:
                engine.scheduler.preempt(engine.scheduler.running[0])
        assert engine.scheduler.num_preemptions == 1
        assert [one.num_cached_tokens for one in finished] == [8, 8]
        engine.submit(prompt, SamplingParams())
        engine.cancel(next(iter(engine.requests.by_id)))
        assert [delta.finished.num_cached_tokens for delta in engine.step()] == [None]


def test_deltas_name_the_weights_of_their_last_token():
    model = HistoryModel()
    with Engine(model, num_blocks=60) as engine:
        engine.submit([5, 6], SamplingParams(max_tokens=4, ignore_eos=True))
        seen = []
        for version in (0, 1, 1, 3):
            model.weights = version
            seen += [delta.weight_version for delta in engine.step()]
    assert seen == [0, 1, 1, 3]


def test_llm_scores_and_says_what_was_cached():
    with LLM(random_model("llama", layers=1, vocabulary=300), byte_level(), num_blocks=60, block_size=4) as llm:
        (first,) = llm.generate(["the lazy dog, the lazy dog"], scored(0))
        (second,) = llm.generate(["the lazy dog, the lazy dog"], SamplingParams(max_tokens=1))
    assert first.outputs[0].token_ids == []
    assert first.outputs[0].cumulative_logprob == 0
    assert len(first.prompt_logprobs) == len(first.prompt_token_ids)
    assert (first.num_cached_tokens, second.num_cached_tokens > 0) == (0, True)
