"""Decode steps inside of forwards and backwards: they come at the borders of modules, and no number changes."""

import threading
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.live import WAIT, Script, live_engine, training
from toolkit.engine import SamplingParams
from toolkit.live import lending as lending_module
from toolkit.live import worker
from toolkit.live.lending import Lending

DECODED = SamplingParams(max_tokens=300, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def engine():
    with live_engine() as one:
        yield one


def run(live, scripts):
    """What each client gets."""
    for script in scripts:
        script.create(live)
        for number in range(1, len(script.requests) + 1):
            script.submit(live, number)
    live.start()
    return {script.name: script.outcome(live) for script in scripts}


def test_steps_inside_of_training_change_no_bit(engine, tmp_path, monkeypatch):
    scripts = [Script("a", 4, 1), Script("b", 8, 2)]
    with training(engine, tmp_path / "undisturbed", start=False, max_wait=None) as live:
        undisturbed = run(live, [Script(one.name, one.rank, one.seed) for one in scripts])
    (alone,) = engine.generate([[5, 6]], DECODED)

    events: list[str] = []
    run_parts, step = worker.run_parts, engine.engine.step

    def noted(model, parts, after_rows=None):
        events.append("begin")
        engine.resume_generation()  # the request waits until the first forward runs
        try:
            return run_parts(model, parts, after_rows)
        finally:
            events.append("end")

    engine.pause_generation()
    handle = engine.submit([[5, 6]], DECODED)
    handle.accepted.result(WAIT)
    monkeypatch.setattr(worker, "run_parts", noted)
    monkeypatch.setattr(engine.engine, "step", lambda: events.append("step") or step())
    with training(engine, tmp_path / "disturbed", start=False, max_wait=0.0) as live:
        found = run(live, scripts)
        decoded = [delta.finished for delta in handle if delta.finished is not None]
    first = events[events.index("begin") : events.index("end")]
    assert first.count("step") > 4 * 2  # modules of two layers, and back
    assert [(one.token_ids, one.logprobs) for one in decoded] == [(alone.token_ids, alone.logprobs)]
    for name, expected in undisturbed.items():
        assert found[name].keys() == expected.keys()
        different = [
            key for key, one in found[name].items()
            if not (torch.equal(one, expected[key]) if isinstance(one, torch.Tensor) else one == expected[key])
        ]  # fmt: skip
        assert different == []


def test_commands_wait_for_the_function_and_errors_are_its_own(engine):
    lending, events = Lending(engine, 0.0), []
    called = threading.Event()

    def function(border):
        threading.Thread(target=lambda: (called.set(), engine.call(lambda: events.append("command")))).start()
        assert called.wait(WAIT)
        with torch.no_grad():
            engine.engine.backend.model(torch.tensor([[5, 6]]))
        events.append("function")
        return 7

    try:
        assert lending.run(function, 1) == 7
        engine.call(lambda: None)
        assert events == ["function", "command"]
        with pytest.raises(ZeroDivisionError):
            lending.run(lambda border: 1 / 0, 1)
        assert lending.run(lambda border: 8, 1) == 8
    finally:
        lending.close()


def test_a_step_runs_before_work_that_would_let_it_wait_too_long(monkeypatch):
    now, steps = [0.0], []

    def step():
        now[0] += 0.01
        steps.append(round(now[0], 3))

    stepping = SimpleNamespace(has_work=True, see_weights=lambda: None)
    engine = SimpleNamespace(engine=stepping, call=lambda function: function(), step_within=step)
    monkeypatch.setattr(lending_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    lending = Lending(engine, 0.05)

    def function(border):
        for name, seconds in (("a", 0.02), ("b", 0.015), ("c", 0.012), ("d", 0.001)):
            border(name, torch.zeros(()))
            now[0] += seconds

    def begun(size):
        begin = now[0]
        steps.clear()
        lending.run(function, size)
        return [round(one - begin, 3) for one in steps]

    try:
        assert begun(10) == []  # nothing is known, and 47 ms are over at the last border
        assert begun(10) == []  # no step was seen, and 48 ms are over at the end
        # Twice the tokens: "b" is expected to end 50 ms after the last step.
        assert begun(20)[0] == 0.03
        stepping.has_work = False
        assert begun(20) == []
    finally:
        lending.close()
