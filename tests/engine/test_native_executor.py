"""Captured graphs run by the native library: what the recorded function returns, for every sort of argument."""

import os
import threading

import pytest
import torch

import toolkit
from tests.helpers.step_functions import BIAS, FUNCTIONS, WEIGHT, before_sampling, numbers
from toolkit.engine.step import decode_graphs
from toolkit.engine.step.executors import straight_line
from toolkit.engine.step.graph import capture
from toolkit.engine.step.native import native_replay
from toolkit.ops import native
from toolkit.ops.linear import linear
from toolkit.ops.rms_norm import rms_norm
from toolkit.testing.models import random_model

pytestmark = pytest.mark.skipif(native.load() is None, reason="the native library is not built")

VIEWS = {getattr(torch.ops.aten, name).default for name in ("view", "unsqueeze", "expand")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_replay_returns_what_the_function_returns(name):
    function = FUNCTIONS[name]
    graph = capture(function, [numbers(5, 32)])
    replay, plain = native_replay(graph), straight_line(graph)
    assert replay is not None
    for seed in range(1, 5):
        x = numbers(5, 32, seed=seed)
        with torch.inference_mode():
            found = replay(x)
            assert torch.equal(found, function(x))
            assert torch.equal(found, plain(x))


def test_a_replay_sees_parameters_that_were_written_or_given_other_memory():
    layer = torch.nn.Linear(32, 4).requires_grad_()
    replay = native_replay(capture(lambda x: layer(x), [numbers(3, 32)]))
    for change in range(3):
        with torch.no_grad():
            layer.weight.add_(1.0)
            if change == 2:
                layer.weight.data = layer.weight.data * 2
            x = numbers(3, 32, seed=change)
            assert torch.equal(replay(x), layer(x))


class Tagged(torch.Tensor):
    """A subclass may do anything when an op meets it, so Python has to call the op."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def test_what_it_has_no_word_for_is_left_to_the_next_executor():
    tagged = WEIGHT.as_subclass(Tagged)
    graph = capture(lambda x: torch.mm(x, tagged.mT), [numbers(3, 32)])
    assert native_replay(graph) is None
    assert torch.equal(straight_line(graph)(WEIGHT[:3]), WEIGHT[:3] @ WEIGHT.mT)
    assert native_replay(capture(lambda x: x + 1, [torch.empty(3, 32, device="meta")])) is None


def test_an_error_of_an_op_is_raised_and_the_next_run_is_right():
    replay = native_replay(capture(lambda x, index: x[index], [numbers(3, 32), torch.tensor([1])]))
    x = numbers(3, 32)
    with pytest.raises(IndexError):
        replay(x, torch.tensor([3]))
    assert torch.equal(replay(x, torch.tensor([2])), x[2:])
    with pytest.raises(RuntimeError, match="inputs must be 2 tensors, got 1"):
        replay(x)


def deep(x):
    for _ in range(12):
        x = rms_norm(linear(linear(x, WEIGHT, BIAS), WEIGHT.mT.contiguous(), None), None, 1e-6)
    return x


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_bits_do_not_depend_on_the_number_of_threads(threads):
    x = numbers(700, 32)
    threads(1)
    expected = deep(x)
    replay = native_replay(capture(deep, [x]))
    for count in (1, 2, 4, 3, 1):
        threads(count)
        for _ in range(5):
            assert torch.equal(replay(x), expected)


def test_replays_of_several_threads_at_a_time(threads):
    threads(3)
    inputs = [numbers(500 + 37 * at, 32, seed=at) for at in range(4)]
    expected = [deep(x) for x in inputs]
    replays = [native_replay(capture(deep, [x])) for x in inputs]
    wrong = []

    def run(at):
        for _ in range(20):
            if not torch.equal(replays[at](inputs[at]), expected[at]):
                wrong.append(at)

    running = [threading.Thread(target=run, args=(at,)) for at in range(4)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_replay_after_a_fork(threads):
    threads(2)
    x = numbers(700, 32)
    expected = deep(x)
    replay = native_replay(capture(deep, [x]))
    assert torch.equal(replay(x), expected)
    child = os.fork()
    if child == 0:
        os._exit(0 if all(torch.equal(replay(x), expected) for _ in range(3)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(replay(x), expected)


@pytest.mark.parametrize("family", ["llama", "mamba2", "deepseek_v3_moe"])
def test_decode_steps_run_natively_with_the_bits_of_python(family):
    model = random_model(family)
    params = toolkit.SamplingParams(max_tokens=12, temperature=0.8, seed=3, ignore_eos=True)
    results = []
    for executors in ((native_replay,), (straight_line,)):
        with toolkit.Engine(model, max_num_seqs=4, max_model_len=64) as engine:
            engine.backend.graphs.executors = executors
            results.append(engine.generate([[5, 6, 7], [9, 8], list(range(40, 70))], params))
            assert engine.backend.graphs.captured > 0
    for ours, plain in zip(*results):
        assert ours.error is None
        assert ours.token_ids == plain.token_ids
        assert ours.logprobs == plain.logprobs


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_launches_of_a_dense_layer(family, monkeypatch):
    """At most ten, views not counted. Beside them the embedding, the rotary tables, the first norm and the head."""
    model, graphs = random_model(family), []
    optimize = decode_graphs.optimize
    monkeypatch.setattr(decode_graphs, "optimize", lambda graph: graphs.append(optimize(graph)) or graphs[-1])
    with toolkit.Engine(model, max_num_seqs=4, max_model_len=64) as engine:
        engine.generate([[5, 6, 7]], toolkit.SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
    model_nodes = before_sampling(graphs[0])
    launches = [str(node.op) for node in model_nodes if node.op not in VIEWS]
    layers = model.config.num_hidden_layers
    assert launches.count("toolkit.attention.default") == launches.count("toolkit.rotary_write.default") == layers
    assert launches.count("toolkit.gated_linear.default") == layers
    beside = 4 + 4 * (family == "gemma2")  # it scales embeddings and bounds logits
    assert len(graphs[0].nodes) - len(model_nodes) <= 8  # samples, log-probabilities and their way into one tensor
    assert len(launches) <= beside + (10 if family == "gemma2" else 8) * layers, launches
