"""Steps that are launched ahead: under any schedule no token, bit, reason or count differs from one step at a time."""

from collections import Counter
from functools import partial

import pytest

from tests.helpers.adapter_folders import save_adapter
from tests.helpers.ahead import (
    NATIVE_OR_PYTHON,
    SMALL_POOL,
    chance_of,
    check_equal,
    check_idle,
    first_in_sweep,
    pair,
    random_plan,
    run,
)
from tests.helpers.fake_device import FakeDevice
from toolkit.engine import runner as runners
from toolkit.engine.step.device_graphs import DeviceGraphs
from toolkit.testing.models import random_model


def random_sleeps(chance, engine):
    """Sleeps and wakes between steps; a function for ``run``."""
    calls = {chance.randrange(60) for _ in range(2)}

    def between(call):
        if call in calls:
            engine.sleep()
            engine.wake()

    return between


def check_schedules(engines, seeds, adapters=()):
    """Run random schedules on both engines."""
    before = [engine.stats()["generation_tokens"] for engine in engines]
    for seed in seeds:
        plan = random_plan(chance_of(seed), adapters)
        expected, found = (run(one, plan, random_sleeps(chance_of(seed), one)) for one in engines)
        check_equal(found, expected)
        for one in engines:
            check_idle(one)
    reasons = Counter(one.finish_reason for outcome in expected for one in outcome.completions.values())
    counts = [engine.stats()["generation_tokens"] - one for engine, one in zip(engines, before)]
    assert counts[0] == counts[1]
    return reasons


SETTINGS = [{}, SMALL_POOL, {**SMALL_POOL, "swap_space": None}, {"max_num_seqs": 2}]


@pytest.fixture(scope="module", params=SETTINGS, ids=str)
def engines(request):
    sync, ahead, launches = pair(**request.param)
    with sync, ahead:
        yield sync, ahead, launches
        if "num_blocks" in request.param:
            assert ahead.stats()["num_preemptions"] > 0


@pytest.mark.parametrize("first", range(100, 160, 10))
def test_random_schedules(engines, first, one_thread):
    *both, launches = engines
    before = launches.count
    check_schedules(both, range(first, first + 10))
    assert launches.count - before > 40


@pytest.mark.parametrize("family", ["mamba2", "gemma2", pytest.param("qwen3_next", marks=pytest.mark.sweep)])
def test_random_schedules_of_other_state(family):
    sync, ahead, launches = pair(NATIVE_OR_PYTHON, family, num_blocks=None)
    with sync, ahead:
        check_schedules((sync, ahead), range(200, 204))
        assert launches.count > 20


def test_random_schedules_on_a_device_that_records():
    """Its memory is poisoned before each replay, and what a step has sampled until the host waits for it."""
    sync, ahead, launches = pair(DeviceGraphs(FakeDevice()), poisoned=True, **SMALL_POOL)
    with sync, ahead:
        check_schedules((sync, ahead), range(300, 305))
        assert launches.count > 25


@pytest.mark.parametrize("first", first_in_sweep(range(1000, 6000, 100), 5))
def test_many_random_schedules(first):
    chance = chance_of(first)
    settings = {"num_blocks": chance.choice((15, 20, 40)), "max_num_seqs": chance.choice((2, 4, 8))}
    sync, ahead, launches = pair(NATIVE_OR_PYTHON, poisoned=True, swap_space=chance.choice((0, None)), **settings)
    with sync, ahead:
        check_schedules((sync, ahead), range(first, first + 100))
        assert launches.count > 400


@pytest.mark.parametrize("first", first_in_sweep(range(10), 2))
def test_many_random_schedules_on_a_device_that_records(first):
    sync, ahead, launches = pair(DeviceGraphs(FakeDevice()), poisoned=True, **SMALL_POOL)
    with sync, ahead:
        check_schedules((sync, ahead), range(first, first + 20))
        assert launches.count > 100


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    pytest.importorskip("peft")
    folder, model = tmp_path_factory.mktemp("adapters"), random_model("llama", hidden=32, layers=1, vocabulary=331)
    return [save_adapter(model, folder / f"{seed}", seed, rank=2 + seed) for seed in range(3)]


def unload(engine, names, last, call):
    """Unload the adapters before call ``last``: those under way finish with them."""
    for one in names if call == last else ():
        engine.unload_adapter(one)


@pytest.mark.parametrize("schedules", [range(400, 401), pytest.param(range(401, 412), marks=pytest.mark.sweep)])
def test_random_schedules_with_adapters(folders, schedules):
    """They are loaded and unloaded while requests run; two of three are in the model at a time."""
    sync, ahead, launches = pair(max_loras=2)
    names = ["a", "b", "c"]
    with sync, ahead:
        for seed in schedules:
            for engine in (sync, ahead):
                for name, folder in zip(names, folders):
                    engine.load_adapter(name, folder)
            plan = random_plan(chance_of(seed), names)
            last = max(one.call for one in plan) + 1
            between = [partial(unload, engine, names, last) for engine in (sync, ahead)]
            expected, found = (run(*one) for one in zip((sync, ahead), (plan, plan), between))
            check_equal(found, expected)
            for engine, unload_left in zip((sync, ahead), between):
                check_idle(engine)
                if engine.adapters.names:  # all requests had ended before
                    unload_left(last)
        assert launches.count > 4 * len(schedules)
        assert ahead.adapters.num_evictions > 0


def test_these_schedules_find_a_token_that_is_not_put_in_place():
    sync, ahead, _ = pair()
    step = ahead.runner.step
    ahead.runner.step = lambda chunks, features, rows=None, previous=None: step(chunks, features, rows)
    with pytest.raises(AssertionError):
        check_schedules((sync, ahead), range(100, 103))


def test_these_schedules_find_a_result_that_is_read_where_the_next_step_writes():
    sync, ahead, _ = pair()
    ahead.runner._read_back = runners._in_place
    with pytest.raises(AssertionError):
        check_schedules((sync, ahead), range(100, 103))


def test_these_schedules_find_a_host_that_reads_a_token_early():
    """It takes the next token from the memory of the step, which is not written before the step is done."""
    sync, ahead, _ = pair(poisoned=True)
    sampling, step = ahead.runner._sampling, ahead.runner.step

    def early(chunks, features, rows=None, previous=None):
        if previous is not None:
            size = ahead.backend.decode_size(len(rows))
            previous = sampling.of(rows, size).result
        return step(chunks, features, rows, previous)

    ahead.runner.step = early
    with pytest.raises(AssertionError):
        check_schedules((sync, ahead), range(100, 103))
