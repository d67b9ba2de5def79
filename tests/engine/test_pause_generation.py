"""Generation that is paused: nothing is lost, and what ends meanwhile is told so."""

import threading

import pytest

from tests.helpers.engine_standin import HistoryModel
from toolkit.engine import AsyncEngine, Engine, SamplingParams

PROMPT = [3, 1, 4]


@pytest.fixture
def engine():
    with AsyncEngine(Engine(HistoryModel(), max_num_seqs=4, block_size=4)) as one:
        yield one


def params(**given):
    return SamplingParams(**{"max_tokens": 20, "ignore_eos": True, "seed": 1, **given})


def test_requests_of_a_pause_run_when_it_ends(engine):
    (whole,) = engine.generate([PROMPT], params())
    engine.pause_generation()
    engine.pause_generation()  # which changes nothing
    handle = engine.submit([PROMPT], params())
    handle.accepted.result(10)
    assert engine.is_paused
    assert engine.generation_paused
    assert engine.has_requests
    assert engine.call(lambda: engine.engine.stats()["num_requests_waiting"]) == 1
    engine.resume_generation()
    engine.resume_generation()
    assert [delta.finished.token_ids for delta in handle if delta.finished] == [whole.token_ids]
    assert not engine.is_paused


def test_others_may_pause_inside_and_end_theirs(engine):
    engine.pause_generation()
    with engine.pause():
        assert engine.is_paused
    assert engine.is_paused
    with engine.pause():
        engine.resume_generation()
        assert engine.is_paused
        assert not engine.generation_paused
    assert not engine.is_paused


@pytest.mark.parametrize("ends", ["cancelled", "timeout"])
def test_what_ends_in_a_pause_is_delivered_in_it(engine, ends):
    engine.pause_generation()
    handle = engine.submit([PROMPT], params(timeout=0.1 if ends == "timeout" else None))
    handle.accepted.result(10)
    if ends == "cancelled":
        handle.cancel()
    (delta,) = list(handle)
    assert delta.finished.finish_reason == ends
    assert not engine.has_requests
    assert engine.stats()["num_steps"] == 0


def test_a_pause_waits_for_the_step_in_progress(engine):
    inside, go_on, order = threading.Event(), threading.Event(), []
    step = engine.engine.step

    def slow():
        inside.set()
        go_on.wait(10)
        order.append("step")
        return step()

    engine.engine.step = slow
    handle = engine.submit([PROMPT], params(max_tokens=1))
    inside.wait(10)
    pausing = threading.Thread(target=lambda: (engine.pause_generation(), order.append("paused")))
    pausing.start()
    go_on.set()
    pausing.join(10)
    assert order == ["step", "paused"]
    engine.resume_generation()
    assert len(list(handle)) == 1


def test_what_a_call_raises_is_raised_by_it(engine):
    def wrong():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        engine.call(wrong)
    assert engine.call(lambda: 7) == 7
