"""Which steps are launched ahead, and what becomes of one that is in flight when something else happens."""

import threading

import pytest

import toolkit
from tests.helpers.ahead import Launches, check_idle, new_engine, pair, plain
from toolkit.errors import ToolkitError


def test_a_step_is_launched_before_the_one_before_it_is_collected():
    ahead = new_engine(True)
    launches = Launches(ahead)
    with ahead:
        ahead.generate([[5, 6], [7, 8, 9]], plain(max_tokens=4))
    order = [("launch", 0), ("collect", 0), ("launch", 1)]
    order += [("launch", 2), ("collect", 1), ("launch", 3), ("collect", 2), ("collect", 3)]
    assert launches.log[: len(order)] == order or launches.log == [("launch", 0), *order[2:4]]


def test_what_ends_unseen_is_dropped_and_its_blocks_come_back():
    """A stop token: the row that ran behind it is in no count, no stream and no cached prefix."""
    sync, ahead, launches = pair()
    with sync, ahead:
        free, _ = (engine.generate([[5, 6, 7]], plain(max_tokens=8))[0] for engine in (sync, ahead))
        before = launches.count
        at = next(at for at in range(2, 8) if free.token_ids[at] not in free.token_ids[:at])
        params = plain(max_tokens=8, stop_token_ids=[free.token_ids[at]])
        for engine in (sync, ahead):
            engine.reset_prefix_cache()
        counts = [engine.stats()["generation_tokens"] for engine in (sync, ahead)]
        expected, found = (engine.generate([[5, 6, 7]], params) for engine in (sync, ahead))
        assert found == expected
        assert found[0].token_ids == free.token_ids[: at + 1]
        assert launches.count - before == at
        stats = [engine.stats() for engine in (sync, ahead)]
        assert [one["generation_tokens"] - before for one, before in zip(stats, counts)] == [at + 1] * 2
        assert stats[0]["num_cached_blocks"] == stats[1]["num_cached_blocks"]
        check_idle(ahead)


def test_a_cancelled_row_keeps_its_blocks_until_the_step_is_collected():
    with new_engine(True) as engine:
        first, second = engine.submit_batch([[5, 6, 7], [8, 9]], plain(max_tokens=30))
        for _ in range(4):
            engine.step()
        held = engine.stats()["num_used_blocks"]
        engine.cancel(first)
        assert engine.stats()["num_used_blocks"] == held
        engine.check_integrity()
        (cancelled, other) = sorted(engine.step(), key=lambda one: one.request_id)
        assert cancelled.finished.finish_reason == "cancelled"
        assert len(cancelled.finished.token_ids) == 4
        assert other.request_id == second
        assert engine.stats()["num_used_blocks"] < held
        engine.cancel(second)  # the last one: nothing is left in flight
        assert engine.stats()["num_used_blocks"] == 0
        engine.take_deltas()
        check_idle(engine)


def test_a_timeout_ends_a_row_in_flight():
    with new_engine(True) as engine:
        engine.submit([5, 6, 7], plain(max_tokens=40, timeout=60.0))
        for _ in range(3):
            engine.step()
        engine.requests._deadlines = [(0.0, request) for _, request in engine.requests._deadlines]
        (delta,) = engine.take_deltas()
        assert delta.finished.finish_reason == "timeout"
        assert len(delta.finished.token_ids) == 3
        check_idle(engine)


@pytest.mark.parametrize(
    "more",
    [
        {"repetition_penalty": 1.2},
        {"bad_words": ["e"]},
        {"logits_processors": [lambda output, row: row]},
        {"structured_outputs": {"regex": "[a-z]{30}"}},
        {"dry_multiplier": 0.5},
        {"typical_p": 0.9},
        {"predicted_token_ids": [5, 6]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_needs_the_tokens_runs_one_step_at_a_time(more):
    engine = new_engine(True)
    launches = Launches(engine)
    with engine:
        engine.generate([[5, 6], [7, 8]], [plain(), plain(**more)])
        assert launches.count == 0
        engine.generate([[5, 6], [7, 8]], [plain(), plain(max_tokens=3, **more)])  # the other one ends first
        assert launches.count > 3


def test_drafts_and_other_models_run_one_step_at_a_time():
    config = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 1}
    for settings, captured in (({"speculative_config": config}, True), ({}, False)):
        engine = new_engine(True, **settings)
        if not captured:
            engine.backend.graphs.serves = lambda *_: False
        launches = Launches(engine)
        with engine:
            engine.generate([[5, 6]], plain())
        assert launches.count == 0


def test_nothing_is_preempted_for_a_token_that_is_not_known():
    engine = new_engine(True, num_blocks=6, max_model_len=24)
    launches = Launches(engine)
    with engine:
        engine.generate([[5, 6, 7], [8, 9, 10]], plain(max_tokens=16))
        assert engine.stats()["num_preemptions"] > 0
        assert 3 < launches.count < 28
        check_idle(engine)


def test_a_launch_that_fails_ends_its_requests_after_the_step_before():
    outcomes = []
    for engine in (new_engine(False), new_engine(True)):
        forward, count = engine.backend.forward, 0

        def failing(*args, forward=forward):
            nonlocal count
            count += 1
            if count == 4:
                raise RuntimeError("out of memory")
            return forward(*args)

        engine.backend.forward = failing
        with engine:
            engine.submit_batch([[5, 6, 7], [8, 9]], [plain(max_tokens=3), plain(max_tokens=9)])
            outcomes.append([engine.step() for _ in range(5)])
            assert [one.finished.error for one in outcomes[-1][3]] == ["RuntimeError: out of memory"]
            check_idle(engine)
            assert engine.generate([[5]], plain(max_tokens=3))[0].finish_reason == "length"
    assert outcomes[0] == outcomes[1]


def test_an_interrupt_in_a_launch_is_raised_and_loses_no_block():
    engine = new_engine(True)
    forward, count = engine.backend.forward, 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return forward(*args)

    with engine:
        engine.backend.forward = interrupted
        engine.submit([5, 6, 7], plain())
        engine.step(), engine.step()
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        (delta,) = engine.take_deltas()
        assert delta.finished.finish_reason == "error"
        check_idle(engine)


def test_a_thread_that_writes_weights_finds_no_step_in_flight():
    with toolkit.AsyncEngine(new_engine(True)) as engine:
        launches = Launches(engine.engine)
        steps = engine.engine._steps
        handles = [engine.submit([[5, 6, at]], plain(max_tokens=40)) for at in range(3)]
        for handle in handles:
            next(iter(handle))
        for _ in range(5):
            with engine.pause():
                assert steps._in_flight is None
                before = engine.engine.stats()["num_steps"]
            engine.pause_generation()
            assert steps._in_flight is None
            assert engine.call(lambda: steps._in_flight) is None
            assert engine.engine.stats()["num_steps"] >= before
            engine.resume_generation()
        found = [list(handle) for handle in handles]
        assert all(one[-1].finished.finish_reason == "length" for one in found)
        assert launches.count > 0
    assert not engine.is_running


def test_a_step_within_a_call_leaves_none_in_flight():
    with toolkit.AsyncEngine(new_engine(True)) as engine:
        launches, steps = Launches(engine.engine), engine.engine._steps
        handle = engine.submit([[5, 6, 7]], plain(max_tokens=40))
        next(iter(handle))

        def function():
            before = launches.count, steps.count
            for _ in range(3):
                engine.step_within()
                assert steps._in_flight is None
            return launches.count - before[0], steps.count - before[1]

        assert engine.call(function) == (0, 3)
        assert len(list(handle)[-1].finished.token_ids) == 40
        assert launches.count > 0


def test_threads_get_what_a_synchronous_engine_gives():
    prompts = [[5, 6, at] for at in range(12)]
    params = [plain(seed=at, max_tokens=4 + at, stop=["e"]) for at in range(12)]
    with new_engine(False) as engine:
        expected = engine.generate(prompts, params)
    with toolkit.AsyncEngine(new_engine(True)) as engine:
        launches, found = Launches(engine.engine), {}

        def ask(at):
            (found[at],) = engine.generate([prompts[at]], params[at])

        threads = [threading.Thread(target=ask, args=(at,)) for at in range(12)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        engine.call(lambda: check_idle(engine.engine))
    for at, one in enumerate(expected):
        assert (found[at].token_ids, found[at].logprobs, found[at].text) == (one.token_ids, one.logprobs, one.text)
        assert found[at].finish_reason == one.finish_reason
    assert launches.count > 0


def test_on_a_cpu_it_is_off_unless_asked_for():
    for flag, runs in ((None, False), (False, False), (True, True)):
        with new_engine(flag) as engine:
            assert engine.runs_ahead is runs
    with pytest.raises(ToolkitError, match=r"^async_scheduling must be .*, got 1\.$"):
        new_engine(1)
