"""Captured mixed steps: rows of prompts beside decoding rows in one graph, on a fake device of fixed addresses."""

import pytest

import toolkit
from tests.helpers.fake_device import FakeDevice
from toolkit.engine.step.decode_graphs import MIXED_SIZES
from toolkit.engine.step.device_graphs import DeviceGraphs
from toolkit.testing.models import random_model

PROMPTS = [[1 + (7 * at + length) % 90 for at in range(length)] for length in (21, 3, 40, 9, 1, 30)]
PARAMS = toolkit.SamplingParams(max_tokens=6, temperature=0.8, seed=1, ignore_eos=True)


def engine_of(model, device=None, mixed=True, **settings):
    settings = {"max_num_seqs": 3, "max_model_len": 64, "block_size": 4, "max_num_batched_tokens": 24, **settings}
    engine = toolkit.Engine(model, **settings)
    graphs = engine.backend.graphs
    if device is None:
        graphs.serves = lambda *_: False
    else:
        graphs.executors, graphs.mixed = (DeviceGraphs(device),), mixed
    return engine


def recorded(device):
    return [rows for call, rows in device.calls if call == "record"]


SWEPT = [pytest.param(family, marks=pytest.mark.sweep) for family in ("mamba2", "qwen3_moe", "gemma2")]


@pytest.mark.parametrize("family", ["llama", "qwen3_next", *SWEPT])
def test_prompts_in_chunks_beside_decoding_rows_are_replayed(family):
    model, device = random_model(family, layers=2), FakeDevice()
    with engine_of(model) as engine:
        expected = engine.generate(PROMPTS, PARAMS)
        eager_steps = engine.stats()["num_steps"]
        engine.reset_prefix_cache()
        turned = engine.generate(PROMPTS[::-1], PARAMS)
    with engine_of(model, device) as engine:
        forward, served = engine.backend.graphs.forward, []
        engine.backend.graphs.forward = lambda *batch: served.append(len(batch[0].batch.tokens)) or forward(*batch)
        assert engine.generate(PROMPTS, PARAMS) == expected
        assert len(served) == engine.stats()["num_steps"] == eager_steps  # no step ran eagerly
        assert {16, 32} <= {*served} <= {1, 2, 3, *MIXED_SIZES}
        count = len(recorded(device))
        assert count < len(served)
        engine.reset_prefix_cache()
        assert engine.generate(PROMPTS[::-1], PARAMS) == turned
        assert len(recorded(device)) - count <= 2  # other divisions of the same rows


def test_a_mixed_step_of_a_device_returns_rows_of_its_sequences_alone():
    model, device = random_model("llama", layers=1), FakeDevice()
    with engine_of(model, device) as engine:
        engine.generate(PROMPTS[:1], PARAMS)
    assert recorded(device)[0] == 3  # logits of 3 sequences, not of 32 rows


def test_mixed_steps_are_captured_ahead_up_to_the_tokens_of_a_step():
    model, device = random_model("llama", layers=1), FakeDevice()
    with engine_of(model) as engine:
        expected = engine.generate(PROMPTS, PARAMS)
    with engine_of(model, device) as engine:
        engine.runner.capture_ahead()
        graphs = len(recorded(device))
        assert graphs == (2 + 3) * len(engine.runner._tables.all_columns)  # of 32 and 16 rows; of 3, 2 and 1
        assert engine.generate(PROMPTS, PARAMS) == expected
        assert len(recorded(device)) == graphs


def test_what_wants_more_rows_than_sequences_and_what_is_larger_runs_eagerly():
    model, device = random_model("llama", layers=1), FakeDevice()
    scored = toolkit.SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=1)
    with engine_of(model) as engine:
        expected = engine.generate(PROMPTS[:1], scored)
    with engine_of(model, device) as engine:
        assert engine.generate(PROMPTS[:1], scored) == expected
        assert 3 not in recorded(device)
    large = {"max_model_len": 400, "max_num_batched_tokens": 2048}
    long = [[1 + at % 90 for at in range(begin, begin + 300)] for begin in (0, 5)]
    with engine_of(model, **large) as engine:
        expected = engine.generate(long, PARAMS)
    device = FakeDevice()
    with engine_of(model, device, **large) as engine:
        assert engine.generate(long, PARAMS) == expected
        assert {*recorded(device)} == {2}


def test_steps_with_prompts_are_not_padded_on_a_cpu():
    with toolkit.Engine(random_model("llama", layers=1), max_num_seqs=3, max_model_len=64) as engine:
        assert engine.backend.mixed_size(10) == 0
        engine.generate(PROMPTS, PARAMS)
        assert all(size in (1, 2, 3) for size, *_ in engine.backend.graphs._graphs)
