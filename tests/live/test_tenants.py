"""A tenant has the numbers that it gets alone, requests are applied once and in order, and decoding continues."""

import random
import threading
from concurrent.futures import Future
from itertools import pairwise

import pytest
import torch

from tests.helpers.live import WAIT, Script, examples, live_engine, sampled, training
from toolkit.engine import SamplingParams
from toolkit.errors import ToolkitError
from toolkit.live import Example, worker
from toolkit.live.ordered import Ordered


@pytest.fixture(scope="module")
def engine():
    with live_engine() as one:
        yield one


def equal(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_three_tenants_at_once_have_the_numbers_of_each_alone(engine, tmp_path, monkeypatch):
    scripts = [Script("a", 4, 1), Script("b", 8, 2), Script("c", 16, 3)]
    alone = {}
    for script in scripts:
        with training(engine, tmp_path / script.name) as live:
            script.create(live)
            for number in range(1, len(script.requests) + 1):
                script.submit(live, number)
            alone[script.name] = script.outcome(live)
    batches = []
    run_parts = worker.run_parts

    def noted(model, parts, *given):
        batches.append(len(parts))
        return run_parts(model, parts, *given)

    monkeypatch.setattr(worker, "run_parts", noted)
    with training(engine, tmp_path / "together", start=False, micro_batch_tokens=1024) as live:
        together = [Script(one.name, one.rank, one.seed) for one in scripts]
        for script in together:
            script.create(live)
        arrivals = [(script, number) for script in together for number in range(1, len(script.requests) + 1)]
        random.Random(0).shuffle(arrivals)  # a client's own requests come out of order too
        for script, number in arrivals:
            script.submit(live, number)
        for script, number in arrivals[::3]:  # and some come twice
            before = script.futures[number]
            script.submit(live, number)
            assert script.futures[number] is before
        live.start()
        for script in together:
            found = script.outcome(live)
            assert found.keys() == alone[script.name].keys()
            different = [name for name, one in found.items() if not equal(one, alone[script.name][name])]
            assert different == []
    assert max(batches) == 3  # several tenants were one forward and backward


def test_a_request_that_comes_early_waits_for_its_turn_and_one_that_comes_twice_is_applied_once():
    released = []
    ordered = Ordered(released.append)
    for number in (3, 2, 2, 5, 1, 1, 3, 4):
        ordered.add(number, f"{number}")
    assert released == ["1", "2", "3", "4", "5"]


def test_sampled_log_probabilities_are_those_of_a_forward_pass(engine, tmp_path):
    with training(engine, tmp_path) as live:
        live.create("a", "base", {"rank": 8, "seed": 5}).result(WAIT)
        live.forward_backward("a", 1, examples(1, 3, 20, False), "cross_entropy", {})
        live.optim_step("a", 2, {"learning_rate": 1e-2})
        for number, inflight in ((3, False), (5, True)):
            target = live.snapshot("a", number, inflight).result(WAIT)
            tokens, logprobs = sampled(live, target, 7)
            whole = torch.tensor([5, 6, 7, *tokens])
            scored = [Example(whole[:-1], whole[1:], {})]
            result = live.forward_backward("a", number + 1, scored, "cross_entropy", {}, True).result(WAIT)
            assert result.logprobs[0][2:].tolist() == list(logprobs)
        base = sampled(live, live.target(None), 7)
        assert base != (tokens, logprobs)


def test_decoding_continues_between_micro_batches(engine, tmp_path, monkeypatch):
    """On the engine's thread no two micro-batches are neighbours while a request decodes.

    A step waits until training asks for the thread, so that the request is there as long as training is.
    """
    events: list[str] = []
    asked, over = threading.Semaphore(2), threading.Event()
    step, call, run_parts = engine.engine.step, engine.call, worker.run_parts

    def step_when_asked():
        while not (asked.acquire(timeout=0.01) or over.is_set()):
            pass
        events.append("step")
        return step()

    def asking(function):
        asked.release()
        return call(function)

    def noted(model, parts):
        events.append("micro-batch")
        return run_parts(model, parts)

    with training(engine, tmp_path, micro_batch_tokens=1, max_wait=None) as live:
        live.create("a", "base", {"rank": 4, "seed": 0}).result(WAIT)
        with monkeypatch.context() as patched:
            patched.setattr(engine.engine, "step", step_when_asked)
            patched.setattr(engine, "call", asking)
            patched.setattr(worker, "run_parts", noted)
            handle = engine.submit([[5, 6]], SamplingParams(max_tokens=400, ignore_eos=True))
            deltas = iter(handle)
            next(deltas)
            live.forward_backward("a", 1, examples(0, 12, 8, False), "cross_entropy", {}).result(WAIT)
            during, unfinished = list(events), handle.num_unfinished
            over.set()
            handle.cancel()
            list(deltas)
    assert unfinished == 1
    assert during.count("micro-batch") == 12
    assert ("micro-batch", "micro-batch") not in pairwise(during)


def test_a_request_that_fails_leaves_its_tenant_and_the_others_as_they_were(engine, tmp_path):
    with training(engine, tmp_path) as live:
        live.create("a", "base", {"rank": 4, "seed": 0}).result(WAIT)
        good = examples(0, 2, 12, False)
        bad = Example(good[0].tokens, good[0].targets, {"weights": torch.full((len(good[0]),), float("nan"))})
        first: Future = live.forward_backward("a", 1, good, "cross_entropy", {})
        failing = live.forward_backward("a", 2, [*good, bad], "cross_entropy", {})
        unknown = live.forward_backward("a", 3, good, "squared", {})
        with pytest.raises(ToolkitError, match=r"data\[2\].weights must be \[\d+\] finite numbers"):
            failing.result(WAIT)
        with pytest.raises(ToolkitError, match="loss_fn must be"):
            unknown.result(WAIT)
        first.result(WAIT)
        norm = live.optim_step("a", 4, {"learning_rate": 0.0}).result(WAIT)
        live.forward_backward("a", 5, good, "cross_entropy", {}).result(WAIT)
        assert live.optim_step("a", 6, {"learning_rate": 0.0}).result(WAIT) == norm > 0
        with pytest.raises(ToolkitError, match="model_id must be a training client"):
            live.optim_step("nobody", 1, {})
        with pytest.raises(ToolkitError, match="while there are other training clients"):
            live.create("b", "base", {"rank": 0})
        with pytest.raises(ToolkitError, match="base_model must be"):
            live.create("b", "another", {"rank": 4})
