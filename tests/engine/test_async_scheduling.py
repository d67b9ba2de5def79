"""Steps that are launched ahead: under any schedule no token, bit, reason or count differs from one step at a time."""

import threading
from collections import Counter
from functools import partial

import pytest
import torch

import toolkit
from tests.helpers.adapter_folders import save_adapter
from tests.helpers.ahead import (
    Launches,
    chance_of,
    check_equal,
    check_idle,
    new_engine,
    poison,
    random_plan,
    run,
)
from tests.helpers.fake_device import FakeDevice
from toolkit.engine import runner as runners
from toolkit.engine.step.device_graphs import DeviceGraphs
from toolkit.engine.step.executors import straight_line
from toolkit.engine.step.native import native_replay
from toolkit.errors import ToolkitError
from toolkit.ops import native
from toolkit.testing.models import random_model

NATIVE_OR_PYTHON = straight_line if native.load() is None else native_replay
SMALL_POOL = {"num_blocks": 15}


def first_in_sweep(values, count):
    """Parameters of which the first ``count`` run in the sweep and the others in the soak."""
    return [
        pytest.param(one, marks=pytest.mark.sweep if at < count else pytest.mark.soak) for at, one in enumerate(values)
    ]


def plain(**more):
    return toolkit.SamplingParams(**{"max_tokens": 10, "temperature": 0.8, "seed": 3, "ignore_eos": True, **more})


def pair(executor=NATIVE_OR_PYTHON, family="llama", poisoned=False, **settings):
    """A synchronous engine, one that launches ahead, and what it launches."""
    sync, ahead = (new_engine(flag, family, executor, **settings) for flag in (False, True))
    launches = Launches(ahead)
    if poisoned:
        poison(ahead)
    return sync, ahead, launches


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


class Aligned:
    """Two engines that have made the same steps whenever something happens to both."""

    def __init__(self, sync, ahead):
        self.engines = self.sync, self.ahead = sync, ahead
        self.finished = [{}, {}]

    def step(self):
        for engine, finished in zip(self.engines, self.finished):
            self._keep(engine.step(), finished)

    def align(self):
        self.ahead.synchronize()
        while self.sync.stats()["num_steps"] < self.ahead.stats()["num_steps"]:
            self._keep(self.sync.step(), self.finished[0])
        assert self.sync.stats()["generation_tokens"] == self.ahead.stats()["generation_tokens"]

    @staticmethod
    def _keep(deltas, finished):
        finished |= {(one.request_id, one.index): one.finished for one in deltas if one.finished is not None}

    def each(self, function, *args):
        self.align()
        for engine in self.engines:
            function(engine, *args)


def trained(engine, seed):
    parameters = list(engine.backend.model.parameters())
    for one in parameters:
        one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(seed))
    torch.optim.SGD(parameters, lr=0.01).step()
    for one in parameters:
        one.grad = None


def slept(engine):
    engine.sleep()
    engine.wake()


def weights_schedule(aligned, chance, steps):
    """Requests come, weights are written and pools sleep, at the same step of both engines; what happened."""
    happened = Counter()
    for _ in range(steps):
        live = list(aligned.sync.requests.by_id)
        if not live or (len(live) < 5 and chance.random() < 0.15):
            (one,) = random_plan(chance, count=1)
            aligned.each(toolkit.Engine.submit, one.prompt, one.params)
            happened["submitted"] += 1
        if chance.random() < 0.1:
            aligned.each(trained, chance.randrange(999))
            happened["trained"] += 1
        if chance.random() < 0.04:
            aligned.each(slept)
            happened["slept"] += 1
        if live and chance.random() < 0.04:
            request = chance.choice(live)
            assert len({engine.cancel(request) for engine in aligned.engines}) == 1
            happened["cancelled"] += 1
        aligned.step()
    while any(engine.has_work for engine in aligned.engines):
        aligned.step()
    expected, found = aligned.finished
    assert found == expected
    return happened


@pytest.mark.parametrize("settings", [{}, SMALL_POOL, {**SMALL_POOL, "swap_space": None}], ids=str)
def test_each_token_has_the_weights_and_the_version_of_its_step(settings):
    sync, ahead, launches = pair(max_num_seqs=16, **settings)
    with sync, ahead:
        aligned = Aligned(sync, ahead)
        happened = weights_schedule(aligned, chance_of(7), 120)
        assert min(happened[one] for one in ("trained", "slept", "cancelled", "submitted")) > 1
        assert launches.count > 20
        versions = [set(one.weight_versions) for one in aligned.finished[1].values()]
        assert sum(len(one) > 1 for one in versions) > 3
        for engine in (sync, ahead):
            check_idle(engine)


@pytest.mark.parametrize("seed", first_in_sweep(range(20), 4))
def test_many_schedules_of_weights(seed):
    sync, ahead, _ = pair(max_num_seqs=16, num_blocks=15 + seed, swap_space=None if seed % 2 else 0)
    with sync, ahead:
        weights_schedule(Aligned(sync, ahead), chance_of(seed), 400)
        for engine in (sync, ahead):
            check_idle(engine)


def test_weights_written_behind_the_engine_leave_a_step_in_flight_with_its_own():
    """Nobody has synchronised: the token is of the old weights and says so, and no block is found under the new key."""
    sync, ahead, _ = pair()
    with sync, ahead:
        for engine in (sync, ahead):
            engine.submit([5, 6, 7, 8, 9], plain(max_tokens=12))
            for _ in range(3):
                engine.step()
        before = ahead.stats()["weight_version"]
        trained(ahead, 1)
        (expected,), (delta,) = sync.step(), ahead.step()
        assert delta == expected
        assert delta.weight_version == before
        versions = []
        while ahead.has_work:
            versions += [one.weight_version for one in ahead.step()]
        assert set(versions) == {ahead.stats()["weight_version"]} != {before}
        assert ahead.generate([[5, 6, 7, 8, 9]], plain(max_tokens=1))[0].num_cached_tokens == 0
        check_idle(ahead)


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
    for settings in ({"speculative_config": config}, {"family": "data_dependent"}):
        family = settings.pop("family", "llama")
        engine = new_engine(True, "llama", **settings)
        if family != "llama":
            engine.backend.graphs.serves = lambda context: False
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


def test_these_schedules_find_a_token_that_is_not_put_in_place(monkeypatch):
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


def test_these_schedules_find_a_host_that_reads_a_token_early(monkeypatch):
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
