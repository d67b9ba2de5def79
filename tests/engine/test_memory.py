"""The engine's memory: hybrids in one pool, swapping, sleeping, and windows that give pages back."""

import pytest
import torch

import toolkit
from toolkit.engine import Engine, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model

HYBRIDS = ["llama", "granite_swa", "qwen3_next", "mamba2", "lfm2"]
PROMPTS = [list(range(3, 3 + n)) for n in (40, 7, 23, 31, 12)]


def params(**given):
    return SamplingParams(**({"max_tokens": 20, "temperature": 1.0, "seed": 5, "ignore_eos": True} | given))


def outcome(completions):
    return [(one.token_ids, one.logprobs) for one in completions]


@pytest.fixture(params=HYBRIDS)
def model(request):
    made = random_model(request.param)
    toolkit.patch(made)
    return made


def test_swapped_sequences_go_on_where_they_were(model):
    with Engine(model, block_size=4) as engine:
        expected = outcome(engine.generate(PROMPTS, params()))
    # Room for one long sequence and a little: the others must make way, again and again.
    with Engine(model, block_size=4, num_blocks=22, swap_space=None, max_num_batched_tokens=64) as engine:
        assert outcome(engine.generate(PROMPTS, params())) == expected
        stats = engine.stats()
        engine.check_integrity()
        assert engine.scheduler.swap.used == 0
    if model.config.model_type in ("llama", "granite_swa"):
        assert stats["num_swaps"] > 0
        with Engine(model, block_size=4, num_blocks=22, swap_space=0, max_num_batched_tokens=64) as engine:
            assert outcome(engine.generate(PROMPTS, params())) == expected
            assert engine.stats()["num_swaps"] == 0


def test_sleep_gives_the_memory_away_and_requests_under_way_survive(model):
    with Engine(model, block_size=4) as engine:
        expected = outcome(engine.generate(PROMPTS, params()))
    with Engine(model, block_size=4) as engine:
        for prompt in PROMPTS:
            engine.submit(prompt, params())
        finished = []
        for _ in range(9):
            finished += [delta.finished for delta in engine.step() if delta.finished]
        engine.sleep()
        engine.sleep()
        stores = [store for state in engine.pool.states for store in state.stores]
        assert sum(store.untyped_storage().nbytes() for store in stores) == 0
        engine.check_integrity()
        assert engine.step() == []
        with pytest.raises(ToolkitError, match="the engine is asleep"):
            engine.generate([[3, 4]], params())
        late = engine.submit(PROMPTS[1], params())
        engine.wake()
        assert all(not store.any() for store in stores)
        while engine.has_work:
            finished += [delta.finished for delta in engine.step() if delta.finished]
        engine.check_integrity()
    first = sorted((one for one in finished if one.request_id < len(PROMPTS)), key=lambda one: one.request_id)
    assert outcome(first) == expected
    (last,) = [one for one in finished if one.request_id == late]
    assert outcome([last]) == [expected[1]]


def test_a_cancelled_sequence_leaves_nothing_on_the_host(model):
    with Engine(model, block_size=4) as engine:
        request = engine.submit(PROMPTS[0], params())
        engine.step()
        engine.sleep()
        assert engine.scheduler.swap.used > 0
        assert engine.cancel(request)
        engine.wake()
        engine.step()
        assert engine.scheduler.swap.used == 0
        engine.check_integrity()


def test_windows_bound_what_a_long_sequence_holds():
    model = random_model("granite_swa")
    toolkit.patch(model)
    with Engine(model, block_size=4, max_num_seqs=1, max_num_batched_tokens=16, enable_prefix_caching=False) as engine:
        full, window = engine.block_manager.allocators
        assert window.num_blocks < full.num_blocks / 4
        engine.submit(list(range(3, 203)), params(max_tokens=50))
        most = 0
        while engine.has_work:
            engine.step()
            most = max(most, window.num_blocks - window.num_free_blocks)
            engine.check_integrity()
    assert most <= 3 + 4 + 1  # nine tokens, and a step's sixteen


@pytest.mark.parametrize("family", ["qwen3_next", "granite_swa"])
def test_prefix_hits_need_what_every_layer_remembers(family):
    model = random_model(family)
    toolkit.patch(model)
    prompt = list(range(3, 303))
    with Engine(model, block_size=4) as engine:
        first = engine.generate([prompt], params())[0]
        hits = engine.stats()["prefix_cache_hits"]
        second = engine.generate([[*prompt[:280], 5, 6, 7]], params())[0]
        got = engine.stats()["prefix_cache_hits"] - hits
    # Recurrent layers keep the state after every sixteenth page of four tokens; others every page.
    assert got == (256 if family == "qwen3_next" else 280)
    for one in (first, second):
        expected = toolkit.token_logprobs(model, [one.prompt_token_ids + one.token_ids])[0]
        assert torch.equal(torch.tensor(one.logprobs), expected[len(one.prompt_token_ids) - 1 :].detach())
