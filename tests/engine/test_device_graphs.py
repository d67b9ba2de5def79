"""Captured graphs as graphs of a device, on a fake one: recorded without a trace, replayed from fixed addresses."""

import pytest
import torch

import toolkit
from tests.helpers.fake_device import FakeDevice
from toolkit.engine.step import decode_graphs
from toolkit.engine.step.cuda_device import cuda_graphs
from toolkit.engine.step.device_graphs import DeviceGraphs
from toolkit.engine.step.graph import capture
from toolkit.testing.models import random_model

PARAMS = toolkit.SamplingParams(max_tokens=8, temperature=0.8, seed=1, ignore_eos=True)
PROMPTS = [[5, 6, 7], [9, 8]]


def engine_of(model, device=None, **settings):
    engine = toolkit.Engine(model, max_num_seqs=4, max_model_len=64, block_size=4, **settings)
    if device is None:
        engine.backend.graphs.serves = lambda *_: False
    else:
        engine.backend.graphs.executors = (DeviceGraphs(device),)
    return engine


def generated(model, device=None, **settings):
    with engine_of(model, device, **settings) as engine:
        return engine.generate(PROMPTS, PARAMS)


@pytest.mark.parametrize("family", ["llama", "mamba2", "qwen3_next"])
def test_a_recording_leaves_no_trace(family):
    """A recurrence that ran twice would be a token ahead."""
    model = random_model(family)
    device = FakeDevice()
    assert generated(model, device) == generated(model)
    assert device.calls == [("warm_up", 2), ("record", 2)]


def test_a_warm_up_on_the_inputs_of_the_step_would_leave_one(monkeypatch):
    model = random_model("mamba2")
    expected = generated(model)
    monkeypatch.setattr(decode_graphs, "_idle", lambda context, count: [None] * count)
    assert generated(model, FakeDevice()) != expected


def test_graphs_that_hold_other_memory_or_read_it_on_the_host_are_left():
    executor, x = DeviceGraphs(FakeDevice()), torch.ones(2, 3)
    graph = capture(lambda x: x * 2, [x])
    assert executor(graph) is None  # of which no idle inputs are known
    graph.idle_inputs = [None]
    assert torch.equal(executor(graph)(x), x * 2)
    assert torch.equal(x, torch.ones(2, 3))
    graph = capture(lambda x: x * torch.tensor(2.0).item(), [x])
    graph.idle_inputs = [None]
    assert executor(graph) is None
    graph = capture(lambda x: x + 1, [torch.ones(2, device="meta")])
    graph.idle_inputs = [None]
    graph.inputs[0].tensor = torch.ones(2, device="meta")
    assert DeviceGraphs(FakeDevice())(graph) is None


def test_a_replay_reads_its_inputs_where_they_were():
    x = torch.ones(2, 3)
    graph = capture(lambda x: x * 2, [x])
    graph.idle_inputs = [None]
    replay = DeviceGraphs(FakeDevice())(graph)
    assert replay.fits([x])
    assert not replay.fits([x.clone()])
    x.fill_(4.0)
    assert torch.equal(replay(x), torch.full((2, 3), 8.0))


def test_cpu_graphs_are_not_cudas():
    assert cuda_graphs(capture(lambda x: x * 2, [torch.ones(3)])) is None


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_what_is_captured_ahead_serves_every_plain_step(family):
    """Largest first, for every number of columns of block tables, and without a trace in the state."""
    model, device = random_model(family), FakeDevice()
    expected = generated(model)
    with engine_of(model, device) as engine:
        before = [store.clone() for state in engine.pool.states for store in state.stores]
        engine.runner.capture_ahead()
        after = [store for state in engine.pool.states for store in state.stores]
        assert all(map(torch.equal, before, after))
        sizes = [rows for call, rows in device.calls if call == "record"]
        assert sizes == [4, 3, 2, 1] * (len(sizes) // 4)
        assert len(sizes) == 4 * len(engine.runner._tables.all_columns)
        recorded = len(device.calls)
        assert engine.generate(PROMPTS, PARAMS) == expected
        assert len(device.calls) == recorded
