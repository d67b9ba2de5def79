"""Requests that run out of time, by a clock that the tests move."""

import asyncio
import random
from types import SimpleNamespace

import pytest

from tests.helpers.engine_standin import HistoryModel
from toolkit.engine import AsyncEngine, Engine, SamplingParams
from toolkit.engine.request_handle import EngineUnavailable
from toolkit.errors import ToolkitError


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr("toolkit.engine.live_requests.time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def params(timeout=None, **given):
    return SamplingParams(**{"max_tokens": 20, "ignore_eos": True, "timeout": timeout, "seed": 1, **given})


def engine_of(**given):
    return Engine(HistoryModel(), **{"max_num_seqs": 2, "block_size": 4, **given})


def finished(deltas):
    return {delta.request_id: delta.finished for delta in deltas if delta.finished is not None}


def test_a_request_that_runs_keeps_what_it_has(clock):
    engine = engine_of()
    (whole,) = engine.generate([[1, 2]], params())
    late = engine.submit([1, 2], params(5.0, n=2))
    deltas = [delta for _ in range(3) for delta in engine.step()]
    clock.seconds += 4.9
    deltas += engine.step()
    assert not finished(deltas)
    assert engine.seconds_left() == pytest.approx(0.1)
    clock.seconds += 0.2
    deltas += engine.step()
    ended = [delta.finished for delta in deltas if delta.finished]
    assert [(one.request_id, one.index, one.finish_reason) for one in ended] == [
        (late, 0, "timeout"), (late, 1, "timeout")
    ]  # fmt: skip
    assert ended[0].token_ids == whole.token_ids[:4]
    assert not engine.has_work
    assert engine.seconds_left() is None
    engine.check_integrity()


class CountedTime(float):
    """A time that counts how often another one is compared with it, or it is taken from another one."""

    looks = 0

    def _look(self) -> float:
        CountedTime.looks += 1
        return float(self)

    def __ge__(self, other):
        return self._look() >= other

    def __rsub__(self, other):
        return other - self._look()


def test_a_step_looks_at_the_next_deadline_and_not_at_all(clock):
    engine = engine_of()
    for index in range(50):
        engine.submit([1, 2], params(100.0 + index))
    clock.seconds = CountedTime(clock.seconds)
    engine.step()
    assert 1 <= CountedTime.looks <= 4


def test_what_waits_beyond_its_time_never_starts(clock):
    engine = engine_of(max_num_seqs=1)
    first = engine.submit([1, 2], params())
    late, patient = engine.submit([3, 4], params(2.0)), engine.submit([5, 6], params(200.0))
    engine.step()
    clock.seconds += 3
    ended = finished(engine.step())
    assert {one: done.finish_reason for one, done in ended.items()} == {late: "timeout"}
    assert ended[late].token_ids == []
    deltas = [delta for _ in range(60) for delta in engine.step()]
    assert {one: done.finish_reason for one, done in finished(deltas).items()} == {first: "length", patient: "length"}
    assert not any(3 in batch.tokens.tolist() for batch in engine.backend.batches)


def test_priority_decides_who_runs_and_time_who_no_longer_does(clock):
    """Against an oracle of one slot: by priority, then arrival, whoever has time left when the slot is free."""
    chance = random.Random(3)
    for _ in range(30):
        engine = engine_of(max_num_seqs=1, enable_prefix_caching=False)
        clock.seconds = 0.0
        asked = []
        for _ in range(6):
            length, priority, timeout = chance.randint(1, 4), chance.randint(0, 2), chance.choice((None, 3.5, 9.5))
            one = params(timeout, max_tokens=length, priority=priority)
            asked.append((priority, engine.submit([1, 2, 3], one), length, timeout))
        expected, now = {}, 0
        for _, request_id, length, timeout in sorted(asked, key=lambda one: one[:2]):
            left = length if timeout is None else max(0, min(length, int(timeout + 1) - now))
            expected[request_id] = ("length" if left == length else "timeout", left)
            now += left
        found = {}
        while engine.has_work:
            found.update(finished(engine.step()))
            clock.seconds += 1
        assert {one: (done.finish_reason, len(done.token_ids)) for one, done in found.items()} == expected
        engine.check_integrity()


def test_time_runs_while_the_engine_sleeps(clock):
    engine = engine_of()
    late = engine.submit([1, 2], params(5.0))
    tokens = [token for delta in engine.step() for token in delta.token_ids]
    engine.sleep()
    clock.seconds += 6
    ended = finished(engine.step())
    assert (ended[late].finish_reason, ended[late].token_ids) == ("timeout", tokens)
    engine.wake()
    assert engine.generate([[1, 2]], params())[0].token_ids[:1] == tokens
    engine.check_integrity()


def test_on_the_thread_what_runs_out_of_time_makes_room_even_asleep():
    with AsyncEngine(engine_of(), max_queued_seqs=2) as engine:
        engine.start()
        engine.sleep()
        handles = [engine.submit([1, 2], params(0.02, priority=priority)) for priority in (0, -1)]
        with pytest.raises(EngineUnavailable, match="at its limit of 2 sequences"):
            engine.submit([1, 2], params())
        for handle in handles:
            assert [delta.finished.finish_reason for delta in handle] == ["timeout"]

        async def served():
            handle = engine.submit([1, 2], params(0.02))
            return [delta.finished.finish_reason async for delta in handle]

        assert asyncio.run(served()) == ["timeout"]
        engine.wake()
        (done,) = engine.generate([1, 2], params())
        assert done.finish_reason == "length"


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), "1", True])
def test_a_timeout_is_a_number_of_seconds(timeout):
    with pytest.raises(ToolkitError, match="timeout must be a finite number > 0, got"):
        params(timeout)
