"""A server that dies and starts again: clients that retry get the undisturbed numbers, nothing is applied twice."""

import random

import pytest
import torch

from tests.helpers.live import WAIT, Script, examples, live_engine, training
from toolkit.errors import ToolkitError
from toolkit.live import LiveConfig, LiveTraining, journal
from toolkit.live.journal import Journal


@pytest.fixture(scope="module")
def engine():
    with live_engine() as one:
        yield one


def started(engine, root, **config):
    """Training that begins; ``close`` ends it as abruptly as its process would: its clients stay in the journals."""
    live = LiveTraining(engine, LiveConfig(("base",), root, durable=True, **config))
    live.start()
    return live


@pytest.mark.sweep
@pytest.mark.parametrize("state_interval", [1, 8])
def test_a_client_that_retries_gets_the_undisturbed_numbers(engine, tmp_path, state_interval):
    undisturbed, random_numbers = Script("a", 4, 1), random.Random(state_interval)
    count = len(undisturbed.requests)
    with training(engine, tmp_path / "undisturbed") as live:
        undisturbed.create(live)
        for number in range(1, count + 1):
            undisturbed.submit(live, number)
        expected = undisturbed.outcome(live)

    script, results, deaths = Script("a", 4, 1), 0, 0
    live = started(engine, tmp_path / "killed", state_interval=state_interval)
    script.create(live)
    while results < count:
        for number in range(results + 1, count + 1):
            if number not in script.futures:
                script.submit(live, number)
        for number in range(results + 1, min(count, results + random_numbers.randint(1, 3)) + 1):
            script.futures[number].result(WAIT)
            results = number
        live.close()
        deaths += 1
        script.futures = {number: one for number, one in script.futures.items() if number <= results}
        live = started(engine, tmp_path / "killed", state_interval=state_interval)
        known = {one.number: one.future for one in live.recovered if one.name == "a"}
        script.futures |= {number: one for number, one in known.items() if number <= results}
    assert deaths >= 3
    found = script.outcome(live)
    assert found.keys() == expected.keys()
    different = [
        name for name, one in found.items()
        if not (torch.equal(one, expected[name]) if isinstance(one, torch.Tensor) else one == expected[name])
    ]  # fmt: skip
    assert different == []
    assert live.tenant("a").optimizer.step == 3
    live.unload("a").result(WAIT)
    live.close()
    assert started_and_closed(engine, tmp_path / "killed").recovered == []


def started_and_closed(engine, root):
    live = started(engine, root)
    live.close()
    return live


def test_what_is_recovered(engine, tmp_path, monkeypatch):
    """Gradients that were not stepped, a checkpoint that was read and is gone now, and old requests."""
    monkeypatch.setattr(journal, "RESULTS", 2)
    live = started(engine, tmp_path, state_interval=1)
    live.create("a", "base", {"rank": 4, "seed": 1}).result(WAIT)
    data = examples(1, 3, 12, False)
    first = live.save("a", 1, "weights", "x").result(WAIT)
    for number in range(2, 10, 2):
        live.forward_backward("a", number, data, "cross_entropy", {})
        live.optim_step("a", number + 1, {"learning_rate": 1e-2})
    live.load("a", 10, first, optimizer=True)
    live.forward_backward("a", 11, data, "cross_entropy", {}).result(WAIT)
    gradients = live.tenant("a").gradients
    live.save("a", 12, "weights", "y").result(WAIT)
    live.close()
    (tmp_path / "a" / "weights" / "x").rename(tmp_path / "a" / "weights" / "z")

    live = started(engine, tmp_path, state_interval=1)
    assert [one.number for one in live.recovered] == [0, 8, 9, 10, 11, 12]
    for one in live.recovered:
        one.future.result(WAIT)
    mine = live.tenant("a")
    assert (mine.optimizer.step, mine.settings.rank) == (0, 4)
    assert all(torch.equal(one, gradients[name]) for name, one in mine.gradients.items())
    with pytest.raises(ToolkitError, match="seq_id must be of the last 1024 requests, got 3"):
        live.optim_step("a", 3, {"learning_rate": 1.0})
    live.close()
    with pytest.raises(ToolkitError, match="base_model must be 'other', got 'base'"):
        LiveTraining(engine, LiveConfig(("other",), tmp_path, durable=True))


def test_a_request_is_on_disk_before_it_is_taken_in(engine, tmp_path, monkeypatch):
    live = started(engine, tmp_path)
    live.create("a", "base", {"rank": 4, "seed": 1}).result(WAIT)

    def fail(*_):
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "write", fail)
        with pytest.raises(OSError, match="no space"):
            live.optim_step("a", 1, {"learning_rate": 1e-2})
    live.optim_step("a", 1, {"learning_rate": 1e-2}).result(WAIT)
    assert live.tenant("a").optimizer.step == 1
    live.close()
