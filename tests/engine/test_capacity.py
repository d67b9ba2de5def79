"""What a step costs follows its tokens, not the pool or the engine's limits; memory follows what was written."""

import resource

import pytest
import torch

import toolkit
from tests.helpers.allocations import allocated_bytes
from tests.helpers.engine_standin import HistoryModel
from toolkit import machine
from toolkit.engine import Engine, SamplingParams
from toolkit.engine.memory_plan import describe_memory, fitting_sequences
from toolkit.errors import ToolkitError
from toolkit.state.lazy_zeros import clear, lazy_zeros
from toolkit.testing.models import random_model

GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
MIB = 1 << 20


def resident():
    """Bytes of this process' memory that exist."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("family", ["llama", "granite_swa", "qwen3_next", "lfm2", "deepseek_v3", "qwen3_moe"])
def test_a_step_of_a_16_bit_model_does_not_follow_capacities(family):
    model = random_model(family).to(torch.bfloat16)
    toolkit.patch(model)

    def run(**limits):
        with Engine(model, block_size=4, **limits) as engine:
            engine.generate([[3, 4, 5, 6, 7]], GREEDY)  # captures the decode step
            return allocated_bytes(
                lambda: [(one.token_ids, one.logprobs) for one in engine.generate([[9, 8, 7, 6, 5]], GREEDY)]
            )

    few = run(num_blocks=8, max_model_len=32, max_num_seqs=2)
    assert run(num_blocks=20_000, max_model_len=500, max_num_seqs=300) == few


def test_a_pool_takes_memory_where_it_was_written():
    model = random_model("llama")
    before = resident()
    with Engine(model, num_blocks=100_000) as engine:
        assert engine.pool.bytes > 200 * MIB
        assert resident() - before < 50 * MIB
        expected = engine.generate([[3, 4, 5]], GREEDY)[0].token_ids
        assert resident() - before < 50 * MIB
        engine.sleep()
        engine.wake()
        assert resident() - before < 50 * MIB
        assert engine.generate([[3, 4, 5]], GREEDY)[0].token_ids == expected


@pytest.mark.parametrize("shape", [(0,), (3, 5), (7, 1000, 33)])
def test_lazy_zeros_are_zeros(shape):
    made = lazy_zeros(shape, torch.bfloat16, torch.device("cpu"))
    assert made.shape == shape
    assert not made.any()
    base = torch.ones(40_003)
    clear(base[3:-5])  # what lies beside a tensor in its pages stays
    assert base.sum() == 8
    clear(made.fill_(torch.nan))
    assert not made.any()


def test_the_default_pool_holds_what_the_limits_can_use(monkeypatch):
    model = random_model("llama")
    with Engine(model, max_num_seqs=3, max_model_len=100) as engine:
        assert engine.stats()["num_blocks"] == 3 * 7
        said = describe_memory(engine).splitlines()
    assert said[0] == "memory plan on cpu, max_model_len 100:"
    assert said[1] == "  weights     0.00 GiB, float32"
    assert said[2] == "  state       0.00 GiB at most, for 336 tokens in blocks of 16"
    assert said[4] == "  fits        3 sequences of 100 tokens"
    monkeypatch.setattr("toolkit.engine.capacity.memory_bytes", lambda: 4 * MIB)
    with Engine(model) as engine:
        assert 0.9 * MIB < engine.pool.bytes <= MIB


def test_a_containers_limits_count(tmp_path, monkeypatch):
    own = tmp_path / "own"
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OWN_CGROUPS", own)

    def write(name, text):
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    own.write_text("0::/pod/one\n")
    assert machine.cpu_quota() is None
    write("pod/one/cpu.max", "max 100000\n")
    write("pod/cpu.max", "150000 100000\n")
    write("pod/memory.max", f"{64 * MIB}\n")
    write("memory.max", "max\n")
    assert machine.cpu_quota() == 1.5
    assert machine.cpu_count() <= 2
    assert machine.memory_bytes() == 64 * MIB
    own.write_text("5:cpu,cpuacct:/docker/x\n9:memory:/docker/x\n")  # version 1
    write("cpu/cpu.cfs_quota_us", "50000\n")
    write("cpu/cpu.cfs_period_us", "100000\n")
    write("memory/memory.limit_in_bytes", f"{32 * MIB}\n")
    assert machine.cpu_quota() == 0.5
    assert machine.cpu_count() == 1
    assert machine.memory_bytes() == 32 * MIB


@pytest.mark.parametrize(("num_blocks", "length"), [(20, 24), (20, 25), (7, 28), (6, 25), (40, 12)])
def test_as_many_sequences_as_the_plan_says_run_without_preemption(num_blocks, length):
    def most_at_once(sequences):
        with Engine(
            HistoryModel(), max_num_seqs=64, num_blocks=num_blocks, block_size=4, max_model_len=length
        ) as engine:
            fits = fitting_sequences(engine, length)
            params = SamplingParams(max_tokens=length - 1, ignore_eos=True)
            engine.submit_batch([[1 + at] for at in range(sequences)], params)
            seen = 0
            while engine.has_work:
                engine.step()
                seen = max(seen, int(engine.stats()["num_requests_running"]))
            return fits, seen, engine.stats()["num_preemptions"]

    fits, _, _ = most_at_once(1)
    assert 0 < fits < 50
    assert most_at_once(fits) == (fits, fits, 0)
    _, together, preempted = most_at_once(fits + 1)
    assert together <= fits or preempted > 0


def test_the_longest_length_that_fits_is_chosen():
    with Engine(HistoryModel(max_model_len=256), num_blocks=20, block_size=4, max_model_len="auto") as engine:
        assert engine.max_model_len == engine.max_sequence_len == 81  # the last token needs no state
        params = SamplingParams(max_tokens=61, ignore_eos=True)
        (completion,) = engine.generate([list(range(1, 21))], params)
        assert completion.finish_reason == "length"
        assert len(completion.token_ids) == 61
        with pytest.raises(ToolkitError, match="81"):
            engine.generate([list(range(1, 22))], params)
    with Engine(HistoryModel(max_model_len=256), block_size=4, max_model_len="auto") as engine:
        assert engine.max_model_len == 256
    with pytest.raises(ToolkitError, match=r"max_model_len must be an integer >= 2, 'auto' or None, got 'long'\."):
        Engine(HistoryModel(), max_model_len="long")
