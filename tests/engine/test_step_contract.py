"""The contract of executors: captured graphs compute what eager steps do, with any change between two steps.

Two engines on one model run the same schedule, one with captured graphs, one always eagerly; the logits of every step
are compared bit by bit, and with them what the engines return.
"""

import random
from collections import Counter

import pytest
import torch
from torch import nn

import toolkit
from tests.helpers.fake_device import FakeDevice
from tests.helpers.step_functions import FUNCTIONS, numbers
from toolkit.engine.runner import ModelRunner
from toolkit.engine.step.device_graphs import DeviceGraphs
from toolkit.engine.step.executors import straight_line
from toolkit.engine.step.graph import capture
from toolkit.engine.step.native import native_replay
from toolkit.engine.step.passes import optimize
from toolkit.engine.step.recorded import RecordedReplay, recorded_replay
from toolkit.errors import ToolkitError
from toolkit.ops import native
from toolkit.patching.weights import WeightClock
from toolkit.testing.models import random_model

NATIVE = pytest.param(native_replay, marks=pytest.mark.skipif(native.load() is None, reason="no native library"))
DEVICE = pytest.param(DeviceGraphs(FakeDevice()), id="device_graphs")
EXECUTORS = [NATIVE, straight_line, recorded_replay, DEVICE]
FIXED = (recorded_replay, *DEVICE.values)  # they stand for devices, which capture mixed steps too
SMALL = {"llama": ["q_proj", "down_proj"], "mamba2": ["in_proj"]}
SWEPT = {**SMALL, "qwen3_moe": ["v_proj"], "gemma2": ["o_proj"], "deepseek_v3": ["o_proj"], "qwen3_next": ["o_proj"]}


class Lockstep:
    """One model in engines that are told the same: one always eager, and one with graphs of each of ``executors``.

    Those of ``mixed`` capture steps with prompts too.
    """

    def __init__(self, family, executors, layers=2, mixed=(), **settings):
        settings = {"num_blocks": 14, "block_size": 4, "max_num_seqs": 6, "max_model_len": 48, "seed": 1, **settings}
        self.model = random_model(family, layers=layers, vocabulary=97)
        self.engines = [toolkit.Engine(self.model, **settings) for _ in (None, *executors)]
        self.captures, self.forwards = Counter(), Counter()
        self.logits = [[] for _ in self.engines]
        self.adapter = None
        for engine, executor, kept in zip(self.engines, (None, *executors), self.logits):
            graphs = engine.backend.graphs
            graphs.executors = (self.counted(executor, at=executor),)
            graphs.mixed = executor in mixed
            graphs.forward = self.counted(graphs.forward, self.forwards, executor)
            step = engine.runner.step if executor else self.of_new_inputs(engine.runner)
            engine.runner.step = self.noted(step, kept)
        self.engines[0].backend.graphs.serves = lambda *_: False

    def counted(self, function, counter=None, at=None):
        counter = self.captures if counter is None else counter

        def counting(*arguments):
            counter[at] += 1
            return function(*arguments)

        return counting

    @staticmethod
    def of_new_inputs(runner):
        """``runner.step`` that finds nothing of an earlier step in its inputs."""
        step, pool = runner.step, runner.pool

        def renewed(chunks, features, sampled_rows):
            fresh = ModelRunner(runner.backend, pool, 6, 128)
            runner._tables, runner._columns = fresh._tables, {}
            return step(chunks, features)

        return renewed

    @staticmethod
    def noted(step, kept):
        def noting(*arguments):
            logits, sampled = step(*arguments)
            kept.append(logits)  # no copy: a replay must not overwrite what an earlier step returned
            return logits, sampled

        return noting

    def each(self, method, *args):
        """Call a method of all engines, which return the same; that."""
        eager, *others = (getattr(engine, method)(*args) for engine in self.engines)
        assert all(one == eager for one in others)
        return eager

    def step(self):
        """One step of all, compared; its deltas."""
        deltas = self.each("step")
        eager, *others = self.logits
        for kept in others:
            assert len(kept) == len(eager)
            assert all(map(torch.equal, kept, eager))
        assert not any(delta.finished is not None and delta.finished.finish_reason == "error" for delta in deltas)
        for kept in self.logits:
            del kept[:-2]
        return deltas

    def close(self):
        for engine in self.engines:
            engine.check_integrity()
            engine.close()


def some_parameter(model, chance):
    """A module, the name of a parameter that it holds, and the parameter."""
    found = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() > 1
    ]
    return chance.choice(found)


def trained(lockstep, chance):
    parameters = [some_parameter(lockstep.model, chance)[2] for _ in range(3)]
    for one in parameters:
        one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(chance.randrange(999)))
    torch.optim.AdamW(dict.fromkeys(parameters), lr=0.01).step()
    for one in parameters:
        one.grad = None


def slept(lockstep, chance):
    lockstep.each("sleep")
    lockstep.each("wake")


def given_other_memory(lockstep, chance):
    _, _, parameter = some_parameter(lockstep.model, chance)
    parameter.data = parameter.data * 1.02


def freed_and_taken_again(lockstep, chance):
    _, _, parameter = some_parameter(lockstep.model, chance)
    storage, value = parameter.untyped_storage(), parameter.detach() * 1.02
    size, address, held = storage.nbytes(), storage.data_ptr(), []
    while storage.data_ptr() in (0, address):  # an allocator may give it its old address again
        storage.resize_(0)
        held.append(torch.empty(size, dtype=torch.uint8))
        storage.resize_(size)
    with torch.no_grad():
        parameter.copy_(value)
    del held


def replaced(lockstep, chance):
    module, name, parameter = some_parameter(lockstep.model, chance)
    setattr(module, name, nn.Parameter(parameter.detach() * 1.02))


def assigned(lockstep, chance):
    state = lockstep.model.state_dict()
    lockstep.model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)


def moved_to_another_dtype(lockstep, chance):
    lockstep.model.double().float()
    with torch.no_grad():
        some_parameter(lockstep.model, chance)[2].mul_(1.02)


def adapted(lockstep, chance):
    if lockstep.adapter is not None:
        lockstep.adapter.unload()
        lockstep.adapter = None
        return
    targets = SWEPT[lockstep.model.config.model_type]
    import peft

    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    lockstep.adapter = peft.tuners.lora.LoraModel(lockstep.model, config, "one")
    lockstep.model.requires_grad_(True)


CHANGES = [
    *[trained] * 5,
    slept,
    given_other_memory,
    freed_and_taken_again,
    replaced,
    assigned,
    moved_to_another_dtype,
    *[adapted] * 2,
]


@pytest.fixture(scope="module")
def adapters():
    return pytest.importorskip("peft")


def random_prompt(chance, prefixes):
    shared = chance.choice(prefixes)[: chance.choice((0, 4, 8, 12))]
    return shared + [chance.randrange(97) for _ in range(chance.randint(1, 6))]


def random_params(chance):
    found = {
        "n": chance.choice((1, 1, 1, 2, 3)),
        "max_tokens": chance.randint(1, 20),
        "temperature": chance.choice((0.0, 0.8)),
        "seed": chance.randrange(1000),
        "logprobs": chance.choice((None, 3)),
        "ignore_eos": True,
    }
    return toolkit.SamplingParams(**found, **random_choices(random.Random(found["seed"])))


def flipped(output, row):
    return row.flip(0) if len(output) % 2 else row


def random_choices(chance):
    """What else decides a token, of every third request."""
    found = {
        "top_k": chance.choice((0, 5)),
        "top_p": chance.choice((1.0, 0.8)),
        "min_p": chance.choice((0.0, 0.1)),
        "repetition_penalty": chance.choice((1.0, 1.0, 1.4)),
        "frequency_penalty": chance.choice((0.0, 0.3)),
        "presence_penalty": chance.choice((0.0, -0.5)),
        "logit_bias": chance.choice((None, {chance.randrange(97): 3.0, chance.randrange(97): -2.5})),
        "allowed_token_ids": chance.choice((None, None, sorted(chance.sample(range(97), 20)))),
        "logits_processors": chance.choice((None, None, None, [flipped])),
    }
    return chance.choice(({}, {}, found))


def run(lockstep, chance, steps, share_of_changes):
    """``steps`` steps of a random schedule; how often each change happened."""
    prefixes = [[chance.randrange(97) for _ in range(12)] for _ in range(2)]
    happened, changes = Counter(), []
    for _ in range(steps):
        live = list(lockstep.engines[0].requests.by_id)
        if not live or (len(live) < 5 and chance.random() < 0.25):
            live.append(lockstep.each("submit", random_prompt(chance, prefixes), random_params(chance)))
        if chance.random() < 0.03:
            assert lockstep.each("cancel", chance.choice(live))
            happened["cancelled"] += 1
        if chance.random() < share_of_changes:
            changes = changes or chance.sample(CHANGES, len(CHANGES))
            change = changes.pop()
            change(lockstep, chance)
            happened[change] += 1
        lockstep.step()
    return happened


def check_schedule(family, executors, steps, seed, layers=2, share_of_changes=0.05):
    """What happened in a random schedule, the engines' counts, and the replays by each executor."""
    chance = random.Random(seed)
    drafts = {"method": "suffix", "prompt_lookup_min": 1, "num_speculative_tokens": seed % 5 + 1, "adaptive": False}
    settings = {"swap_space": chance.choice((0, None)), "speculative_config": drafts if seed % 2 else None}
    lockstep = Lockstep(family, executors, layers, FIXED, **settings)
    happened = run(lockstep, chance, steps, share_of_changes)
    stats = lockstep.each("stats")
    lockstep.close()
    return happened, stats, [lockstep.forwards[one] - lockstep.captures[one] for one in executors]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("family", SMALL)
def test_random_schedules(family, seed, executor, adapters):
    happened, stats, (replays,) = check_schedule(
        family, [executor], 75 + 25 * (seed % 2), seed, layers=1, share_of_changes=0.2
    )
    assert {*CHANGES, "cancelled"} <= happened.keys()
    assert replays > 30
    assert stats["num_preemptions"] > 0
    assert stats["prefix_cache_hits"] > 0


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(10, 14))
@pytest.mark.parametrize("family", SWEPT)
def test_many_random_schedules(family, seed, adapters):
    executors = [straight_line, recorded_replay, *([native_replay] if native.load() is not None else [])]
    _, _, replays = check_schedule(family, executors, 300, seed)
    assert min(replays) > 100


def steady(executor, **settings):
    """Engines in lockstep with two sequences that decode."""
    lockstep = Lockstep("llama", [executor], layers=1, num_blocks=64, max_model_len=128, **settings)
    for prompt in ([5, 6, 7], [9, 8]):
        lockstep.each("submit", prompt, toolkit.SamplingParams(max_tokens=60, temperature=0.8, seed=3, ignore_eos=True))
    for _ in range(3):
        lockstep.step()
    assert lockstep.captures[executor] == 1
    return lockstep


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_capture_outlives_training(executor):
    lockstep, chance = steady(executor), random.Random(4)
    for _ in range(8):
        trained(lockstep, chance)
        lockstep.step()
    assert lockstep.captures[executor] == 1
    lockstep.close()


def test_block_tables_grow_in_recorded_buffers_and_beyond():
    lockstep = steady(recorded_replay)
    for _ in range(50):
        lockstep.step()
    assert 2 <= lockstep.captures[recorded_replay] <= 6  # 55 tokens, blocks of 4: a table of 1, 2, 4, 8 and 16 columns
    lockstep.close()


# Not ``slept``: a pool may wake up at the addresses that it had, and then there is nothing to notice.
MOVES = [freed_and_taken_again, given_other_memory, moved_to_another_dtype]


@pytest.mark.parametrize("move", MOVES)
def test_fixed_addresses_notice_other_memory_without_the_weight_clock(move, monkeypatch):
    lockstep, chance = steady(recorded_replay), random.Random(5)
    monkeypatch.setattr(WeightClock, "_number_of_layout", lambda self: self.layout)
    for count in (2, 3):
        move(lockstep, chance)
        while not lockstep.step():
            pass
        lockstep.step()
        assert lockstep.captures[recorded_replay] >= count
    lockstep.close()


@pytest.mark.parametrize("move", MOVES)
def test_these_schedules_find_a_back_end_that_does_not_look_at_addresses(move, monkeypatch):
    lockstep, chance = steady(recorded_replay), random.Random(5)
    monkeypatch.setattr(WeightClock, "_number_of_layout", lambda self: self.layout)
    monkeypatch.setattr(RecordedReplay, "addresses_hold", lambda self: True)

    def steps():
        for _ in range(6):
            move(lockstep, chance)
            lockstep.step()
            lockstep.step()

    with pytest.raises(AssertionError):
        steps()


def test_native_and_straight_line_follow_other_memory_without_a_look(monkeypatch):
    monkeypatch.setattr(WeightClock, "_number_of_layout", lambda self: self.layout)
    for executor in (native_replay, straight_line) if native.load() is not None else (straight_line,):
        lockstep, chance = steady(executor), random.Random(6)
        for move in (slept, freed_and_taken_again, given_other_memory):
            move(lockstep, chance)
            for _ in range(3):
                lockstep.step()
        assert lockstep.captures[executor] == 1
        lockstep.close()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_recorded_replay_returns_what_the_function_returns(name):
    function = FUNCTIONS[name]
    replay = recorded_replay(capture(function, [numbers(5, 32)]))
    for seed in range(1, 4):
        x = numbers(5, 32, seed=seed)
        with torch.inference_mode():
            assert torch.equal(replay(x), function(x))
    assert replay(x).data_ptr() == replay(numbers(5, 32)).data_ptr()  # until the next replay


def test_a_recorded_replay_stays_at_its_addresses():
    layer = nn.Linear(32, 4)
    x, replay = numbers(3, 32), recorded_replay(capture(lambda x: layer(x), [numbers(3, 32)]))
    before = layer(x).detach()
    with torch.no_grad():
        layer.bias.add_(1.0)
    assert replay.addresses_hold()
    assert torch.equal(replay(x), layer(x))
    layer.bias.data = layer.bias.data - 1.0
    assert not replay.addresses_hold()
    assert not torch.equal(replay(x), layer(x))
    torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize(
    "change", [lambda w: w.T, lambda w: w.view(torch.int32), lambda w: w[:16], lambda w: w.clone()]
)
def test_addresses_are_those_of_the_same_shape_strides_and_dtype(change):
    weight = torch.nn.Buffer(numbers(32, 32))
    replay = recorded_replay(capture(lambda x: x @ weight, [numbers(3, 32)]))
    assert replay.addresses_hold()
    weight.data = change(weight.data)
    assert not replay.addresses_hold()


def test_what_was_not_written_is_poison():
    graph = capture(lambda x: (x * 2 + 1).exp(), [numbers(3, 32)])
    graph.nodes.pop(0)
    assert recorded_replay(graph)(numbers(3, 32)).isnan().all()


def test_what_reads_values_on_the_host_is_not_recorded():
    with pytest.raises(ToolkitError, match="must not read values on the host"):
        recorded_replay(capture(lambda x: x[x > 0], [numbers(3, 32)]))
    scale, x = torch.tensor(2.0), numbers(3, 32)
    graph = capture(lambda x: x * scale.item(), [x])
    with pytest.raises(ToolkitError, match="_local_scalar_dense"):
        recorded_replay(graph)
    assert torch.equal(recorded_replay(optimize(graph))(x), x * 2.0)  # a number now, until the constant is written
