"""Prefixes of models whose state is a snapshot: hits that are shorter than the interval, with the bits of no cache."""

import pytest

import toolkit
from toolkit.engine import Engine, SamplingParams
from toolkit.testing.models import random_model

FAMILIES = ["qwen3_next", "mamba2", "lfm2", "bamba"]
SHARED = [3 + n * 7 % 300 for n in range(200)]
GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
ROOM = {"max_num_seqs": 4, "max_num_batched_tokens": 512}


def prompt(own, length=50):
    return SHARED + [5 + own * 31 % 200 + n for n in range(length)]


def outcome(completion):
    return completion.token_ids, completion.logprobs


@pytest.fixture(params=FAMILIES)
def model(request):
    made = random_model(request.param)
    toolkit.patch(made)
    return made


def run(engine, tokens):
    """The completion of one prompt, and how many of its tokens were found."""
    before = engine.stats()["prefix_cache_hits"]
    completion = engine.generate([tokens], GREEDY)[0]
    engine.check_integrity()
    return completion, engine.stats()["prefix_cache_hits"] - before


def test_a_prefix_seen_twice_is_found_by_the_third(model):
    with Engine(model, enable_prefix_caching=False, **ROOM) as engine:
        expected = [outcome(engine.generate([prompt(own)], GREEDY)[0]) for own in range(4)]
    with Engine(model, **ROOM) as engine:
        found = [run(engine, prompt(own)) for own in range(4)]
    assert [outcome(completion) for completion, _ in found] == expected
    assert [hit for _, hit in found] == [0, 0, 192, 192]


def test_a_conversation_goes_on_from_the_end_of_its_last_turn(model):
    with Engine(model, **ROOM) as engine:
        first, _ = run(engine, prompt(1))
        again, hit = run(engine, prompt(1))
        assert (outcome(again), hit) == (outcome(first), 240)  # 249 may be shared, in whole blocks of 16
        longer = prompt(1) + first.token_ids + [9] * 30
        turn, hit = run(engine, longer)
        assert hit == 240
    with Engine(model, enable_prefix_caching=False, **ROOM) as engine:
        assert outcome(engine.generate([longer], GREEDY)[0]) == outcome(turn)


@pytest.mark.parametrize("chunk", [7, 64, 100])
def test_snapshots_do_not_depend_on_the_chunks_of_a_prompt(model, chunk):
    with Engine(model, enable_prefix_caching=False, **ROOM) as engine:
        expected = [outcome(engine.generate([prompt(own)], GREEDY)[0]) for own in range(3)]
    with Engine(model, max_num_seqs=4, max_num_batched_tokens=chunk) as engine:
        found = [run(engine, prompt(own)) for own in range(3)]
    assert [outcome(completion) for completion, _ in found] == expected
    assert found[2][1] == 192


def test_snapshots_leave_room_for_what_runs(model):
    """A pool of few blocks: snapshots that nobody has to have preempt no one, and are evicted like any prefix."""
    prompts = [prompt(own, 3 + own) for own in range(12)]
    with Engine(model, enable_prefix_caching=False, **ROOM) as engine:
        expected = [outcome(one) for one in engine.generate(prompts, GREEDY)]
        preempted = engine.stats()["num_preemptions"]
    with Engine(model, num_blocks=60, **ROOM) as engine:
        assert [outcome(one) for one in engine.generate(prompts, GREEDY)] == expected
        assert engine.stats()["num_preemptions"] <= preempted
        engine.check_integrity()
