"""The engine on its thread: many threads and event loops at once, pauses, sleep, failures and the shutdown."""

import asyncio
import dataclasses
import random
import threading

import pytest

from tests.helpers.engine_standin import VOCAB, HistoryModel, oracle, random_prompts, result
from tests.helpers.engine_tokenizers import byte_level
from toolkit.engine import AsyncEngine, Engine, EngineListener, EngineUnavailable, SamplingParams, prompts
from toolkit.errors import ToolkitError

LONG = SamplingParams(max_tokens=200, ignore_eos=True, seed=1)


def make(**more) -> AsyncEngine:
    return AsyncEngine(Engine(HistoryModel(), max_num_seqs=4, block_size=4, num_blocks=64, **more))


def finished(handle):
    return [delta.finished for delta in handle if delta.finished is not None]


def test_texts_are_tokenised_where_they_are_submitted(monkeypatch):
    tokenizer, threads = byte_level(), []
    encode = prompts.rust_encoding

    def watched(*args, **kwargs):
        threads.append(threading.current_thread().name)
        return encode(*args, **kwargs)

    monkeypatch.setattr(prompts, "rust_encoding", watched)
    monkeypatch.setattr(prompts, "prompt_token_ids", lambda *_: pytest.fail("the engine's thread tokenised"))
    params = SamplingParams(max_tokens=5, seed=1)
    with AsyncEngine(Engine(HistoryModel(max_model_len=32), tokenizer, max_num_seqs=4, num_blocks=64)) as async_engine:
        texts = ["ABC", "12"]
        ids = [tokenizer.convert_tokens_to_ids(list(text)) for text in texts]
        assert [one.token_ids for one in async_engine.generate(texts, params)] == [
            oracle(one, params)[0][0] for one in ids
        ]
        assert threads == [threading.current_thread().name] * 2
        with pytest.raises(ToolkitError, match="characters, which is all that fits"):
            async_engine.submit("A" * 10_000, params).accepted.result()
        assert len(threads) == 2


def test_a_model_is_no_engine():
    with pytest.raises(ToolkitError, match="engine must be an Engine, got HistoryModel; make one with Engine"):
        AsyncEngine(HistoryModel())


def test_submit_and_cancel_from_other_threads():
    async_engine = make()
    asked, done, lock = {}, {}, threading.Lock()

    def client(seed):
        rng = random.Random(seed)
        handles = []
        for prompt in random_prompts(rng, 8):
            params = SamplingParams(max_tokens=10, seed=seed)
            handles.append((async_engine.submit(prompt, params), prompt, params))
            assert async_engine.stats()["num_blocks"] == 64
            if rng.random() < 0.3:
                handles[-1][0].cancel()
        for handle, prompt, params in handles:
            (number,) = handle.accepted.result()
            with lock:
                asked[number] = (prompt, params)
                (done[number],) = finished(handle)

    def caller(seed):
        params = SamplingParams(max_tokens=6, seed=seed)
        completions = async_engine.generate([[seed, 1], [seed, 2]], params)
        assert [result(one) for one in completions] == [oracle([seed, at], params)[0] for at in (1, 2)]
        with lock:
            asked[-seed] = done[-seed] = None

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
    clients += [threading.Thread(target=caller, args=(seed,)) for seed in (5, 6)]
    for one in clients:
        one.start()
    for one in clients:
        one.join(60)
    assert async_engine.shutdown(cancel_requests=False, close_engine=False, timeout=60)
    assert not async_engine.is_running
    assert len(asked) == 4 * 8 + 2
    assert set(asked) == set(done)
    assert -5 in asked
    assert -6 in asked
    for number, given in asked.items():
        if given is not None and done[number].finish_reason != "cancelled":
            assert result(done[number]) == oracle(*given)[0]
    async_engine.engine.check_integrity()
    assert async_engine.engine.stats()["num_used_blocks"] == 0


def test_prompts_of_one_handle_and_of_several_event_loops():
    prompts, params = [[1, 2], [3], [4, 5, 6]], SamplingParams(max_tokens=7, n=2, seed=3)
    expected = [one for prompt in prompts for one in oracle(prompt, params)]

    async def collect(async_engine):
        handle = async_engine.submit(prompts, params)
        assert len(await handle.wait_accepted()) == 3
        deltas = [delta async for delta in handle]
        completions = [delta.finished for delta in deltas if delta.finished]
        for one in completions:
            mine = [delta for delta in deltas if (delta.prompt_index, delta.index) == (one.prompt_index, one.index)]
            assert [token for delta in mine for token in delta.token_ids] == one.token_ids
        return [result(one) for one in sorted(completions, key=lambda one: (one.prompt_index, one.index))]

    with make() as async_engine:
        got = [[] for _ in range(3)]
        threads = [
            threading.Thread(target=lambda into=into: into.append(asyncio.run(collect(async_engine)))) for into in got
        ]
        for one in threads:
            one.start()
        assert [result(one) for one in async_engine.generate(prompts, params)] == expected
        for one in threads:
            one.join(60)
        assert got == [[expected]] * 3
        assert async_engine.generate([]) == []


def test_a_stream_that_is_left_cancels_its_requests():
    with make() as async_engine:
        stream = async_engine.stream([[1], [2]], LONG)
        numbers = {next(stream).request_id for _ in range(4)}
        stream.close()
        (done,) = async_engine.generate([3], SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(done.token_ids) == 3
        assert numbers == {0, 1}
        assert async_engine.stats()["num_requests_running"] == 0
        handle = async_engine.submit([4], LONG)
        async_engine.cancel(handle.accepted.result()[0])
        assert [one.finish_reason for one in finished(handle)] == ["cancelled"]
        handle.cancel()


@pytest.mark.parametrize("paused", [False, True])
def test_who_is_told_that_a_request_has_ended_finds_it_ended(paused):
    params = dataclasses.replace(LONG, n=3)
    with make() as async_engine:
        if paused:
            async_engine.pause_generation()
        handle = async_engine.submit([[1], [2, 3]], params)
        told, put = [], handle.put

        def noted(event):
            queued = sum(async_engine.stats()[f"num_requests_{state}"] for state in ("running", "waiting"))
            told.append((isinstance(event, Exception), handle.num_unfinished + queued))
            return put(event)

        handle.put = noted
        handle.accepted.result(30)
        async_engine.cancel_handle(handle, ToolkitError("Too late."))
        with pytest.raises(ToolkitError, match=r"Too late\."):
            list(handle)
        assert [unfinished for failed, unfinished in told if failed] == [0]
        assert handle.finish_reasons == ["cancelled"] * 6
        assert async_engine.has_requests is False
        if paused:
            async_engine.resume_generation()


def test_tokens_are_counted_before_the_statistics_say_so_and_before_anybody_is_told():
    seen, engine = [], Engine(HistoryModel(), num_blocks=64)
    steps, step = [], engine.step
    engine.step = lambda: (steps.append(1), step())[1]
    engine.stats = lambda: {"steps": len(steps)}

    class Counts(EngineListener):
        def on_delta(self, handle, delta):
            seen.append(("counted", async_engine.stats()["steps"]))

    with AsyncEngine(engine, listener=Counts()) as async_engine:
        with async_engine.pause():
            handle = async_engine.submit([[1], [2]], SamplingParams(max_tokens=1, ignore_eos=True))
            put = handle.put
            handle.put = lambda event: (seen.append(("told", async_engine.stats()["steps"])), put(event))[1]
        list(handle)
    assert seen == [("counted", 0), ("counted", 0), ("told", 1), ("told", 1)]


def test_who_has_called_finds_it_in_the_statistics():
    with make() as async_engine:
        go, calls = threading.Event(), []
        async_engine.engine.stats = lambda: {"calls": len(calls)}
        async_engine._step = lambda: [go.wait(30)][1:]
        async_engine.call(lambda: calls.append(1))
        assert async_engine.stats() == {"calls": 1}
        go.set()


def test_what_cannot_run_is_an_error_and_starts_nothing():
    with make(max_model_len=64) as async_engine:
        with pytest.raises(ToolkitError, match="prompt must have <= 63 tokens"):
            async_engine.generate([[1], [1] * 64])
        with pytest.raises(ToolkitError, match="params must have one entry per prompt"):
            async_engine.submit([[1], [2]], [SamplingParams()])
        with pytest.raises(ToolkitError, match="prompts must be"):
            async_engine.stream(5)
        handle = async_engine.submit([[1], []])
        assert "prompt must have >= 1 tokens" in str(handle.accepted.exception(60))
        with pytest.raises(ToolkitError, match="prompt must have >= 1 tokens"):
            finished(handle)
        assert [one.finish_reason for one in async_engine.generate([[1, VOCAB]])] == ["error"]
        assert async_engine.stats()["generation_tokens"] == 0


def test_more_sequences_than_the_bound_are_rejected_until_there_is_room():
    async_engine = AsyncEngine(Engine(HistoryModel()), max_queued_seqs=3)
    with async_engine:
        with pytest.raises(ToolkitError, match="must have <= 3 sequences, got 4"):
            async_engine.submit([1], SamplingParams(n=4))
        with async_engine.pause():
            handle = async_engine.submit([[1], [2]], SamplingParams(max_tokens=3))
            with pytest.raises(EngineUnavailable, match="limit of 3 sequences"):
                async_engine.submit([[1], [2]])
            third = async_engine.submit([3], SamplingParams(max_tokens=3))
        assert len(finished(handle)) == 2
        assert len(finished(third)) == 1
        assert len(async_engine.generate([[1], [2]])) == 2


def test_no_step_runs_while_paused_or_asleep():
    with make() as async_engine:
        handle = async_engine.submit([1, 2], LONG)
        deltas = iter(handle)
        next(deltas)
        with async_engine.pause():
            assert async_engine.is_paused
            steps = async_engine.engine.stats()["num_steps"]
            late = async_engine.submit([3], SamplingParams(max_tokens=2, ignore_eos=True))
            assert late.accepted.result(60)  # accepted, and not run
            assert async_engine.engine.stats()["num_steps"] == steps
        assert not async_engine.is_paused
        (done,) = finished(late)
        assert len(done.token_ids) == 2
        async_engine.sleep()
        assert async_engine.engine.is_sleeping
        steps = async_engine.stats()["num_steps"]
        other = async_engine.submit([4], LONG)
        other.cancel()
        assert [one.finish_reason for one in finished(other)] == ["cancelled"]
        assert async_engine.stats()["num_steps"] == steps
        async_engine.wake()
        *_, last = deltas
        assert result(last.finished) == oracle([1, 2], LONG)[0]


def test_a_shutdown_ends_requests_or_waits_for_them():
    async_engine = make()
    handle = async_engine.submit([1, 2], LONG)
    next(iter(handle))
    assert async_engine.shutdown(timeout=60)
    with pytest.raises(EngineUnavailable, match="shutting down"):
        finished(handle)
    with pytest.raises(EngineUnavailable, match="shutting down"):
        async_engine.submit([1])
    with pytest.raises(EngineUnavailable, match="thread has ended"):
        async_engine.sleep()
    with pytest.raises(ToolkitError, match="the engine is closed"):
        async_engine.engine.submit([1])
    assert async_engine.shutdown()
    engine = Engine(HistoryModel())
    async_engine = AsyncEngine(engine)
    handle = async_engine.submit([1, 2], LONG)
    assert async_engine.shutdown(cancel_requests=False, close_engine=False)
    assert [result(one) for one in finished(handle)] == oracle([1, 2], LONG)
    assert [result(one) for one in engine.generate([1, 2], LONG)] == oracle([1, 2], LONG)
    unused = AsyncEngine(engine)
    assert unused.shutdown()
    with pytest.raises(EngineUnavailable):
        unused.submit([1])


class Noted(EngineListener):
    def __init__(self):
        self.events = []

    def on_accepted(self, handle):
        self.events.append("accepted")

    def on_delta(self, handle, delta):
        self.events.append("finished" if delta.finished else "delta")

    def on_failed(self, handle, error):
        self.events.append(f"failed: {error}")

    def on_stopped(self):
        self.events.append("stopped")


def test_a_listener_hears_all_of_it():
    listener = Noted()
    with AsyncEngine(Engine(HistoryModel()), listener=listener) as async_engine:
        async_engine.generate([1], SamplingParams(max_tokens=3, ignore_eos=True))
        with pytest.raises(ToolkitError):
            async_engine.generate([[]])
    assert listener.events == [
        "accepted", "delta", "delta", "finished", "failed: prompt must have >= 1 tokens, got 0.", "stopped",
    ]  # fmt: skip


def test_an_engine_that_fails_ends_its_requests(capsys):
    model, listener = HistoryModel(), Noted()
    async_engine = AsyncEngine(Engine(model), listener=listener)
    with async_engine.pause():
        handle = async_engine.submit([1], LONG)
        handle.accepted.result(60)
        model.failure = SystemExit("pulled the plug")
    with pytest.raises(EngineUnavailable, match="The engine has stopped: pulled the plug"):
        finished(handle)
    assert async_engine.shutdown()
    with pytest.raises(EngineUnavailable, match="The engine has stopped"):
        async_engine.submit([1])
    assert isinstance(async_engine.failure, SystemExit)
    assert listener.events[-1] == "stopped"
    assert "pulled the plug" in capsys.readouterr().err


class Raising(EngineListener):
    """Raises wherever it is told something."""

    def on_accepted(self, handle):
        raise RuntimeError("told of an acceptance")

    def on_delta(self, handle, delta):
        raise RuntimeError("told of a delta")

    def on_failed(self, handle, error):
        raise RuntimeError("told of a failure")

    def on_stopped(self):
        raise RuntimeError("told of the end")


def test_no_request_waits_for_a_listener_that_raises(capsys):
    with AsyncEngine(Engine(HistoryModel(), num_blocks=64), listener=Raising()) as async_engine:
        params = SamplingParams(max_tokens=6, seed=3)
        (completion,) = async_engine.generate([[1, 2]], params)
        assert result(completion) == oracle([1, 2], params)[0]
        refused = async_engine.submit([[1] * 100_000], params)
        assert isinstance(refused.accepted.exception(60), ToolkitError)
        assert async_engine.failure is None
        assert async_engine.is_running
    assert async_engine.has_ended
    assert "told of a delta" in capsys.readouterr().err


def test_a_stream_that_is_closed_unread_is_cancelled():
    with make() as async_engine:
        async_engine.stream([[1, 2]], LONG).close()
        (completion,) = async_engine.generate([[1, 2]], SamplingParams(max_tokens=4, seed=1))
        assert completion.finish_reason == "length"
        for _ in range(500):
            if not async_engine.stats()["num_requests_running"]:
                break
            threading.Event().wait(0.01)
        assert async_engine.stats()["num_requests_running"] == 0
        assert async_engine.stats()["generation_tokens"] < 200


def test_callers_do_not_wait_for_a_thread_that_has_failed(monkeypatch):
    async_engine = make()
    monkeypatch.setattr(async_engine.engine, "step", lambda: 1 / 0)
    handle = async_engine.submit([[1, 2]], LONG)
    with pytest.raises(EngineUnavailable, match="has stopped"):
        finished(handle)
    async_engine.join(60)
    assert async_engine.has_ended
    with pytest.raises(EngineUnavailable):
        async_engine.sleep()
