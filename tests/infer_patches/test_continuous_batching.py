"""transformers' continuous batching on the engine, against its own ``generate`` of the unpatched model."""

import asyncio
import copy

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

import toolkit
from infer_patches.continuous_batching import EngineManager, route_continuous_batching
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model

PROMPTS = [[3, 4, 5, 6, 7], [9, 8], [20, 21, 22, 23, 24, 25, 26, 27, 28], [3, 4, 5, 6, 9]]


def greedy(**more):
    return GenerationConfig(**{"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | more)


@pytest.fixture(scope="module")
def pair():
    model = random_model("llama")
    own = copy.deepcopy(model)
    toolkit.patch(model)
    with route_continuous_batching(model, num_blocks=64):
        yield own, model


def expected(own, prompt, **settings):
    config = greedy(**settings)
    return own.generate(torch.tensor([prompt]), config, pad_token_id=0)[0, len(prompt) :].tolist()


def test_a_batch_is_what_generate_gives(pair):
    own, model = pair
    ends = [expected(own, PROMPTS[0])[3], expected(own, PROMPTS[2])[5]]
    for settings in ({}, {"eos_token_id": ends}):
        # The cache that a checkpoint's configuration names is the engine's own.
        config = greedy(**settings, cache_implementation="static" if settings else None)
        results = model.generate_batch(PROMPTS, config, record_timestamps=True)
        assert list(results) == ["req_0", "req_1", "req_2", "req_3"]
        for prompt, result in zip(PROMPTS, results.values()):
            assert type(result) is GenerationOutput
            assert result.status is RequestStatus.FINISHED
            assert (result.prompt_ids, result.error, result.logprobs) == (prompt, None, [])
            assert result.generated_tokens == expected(own, prompt, **settings)
            assert len(result.timestamps) == len(result.generated_tokens)
            assert result.created_time <= result.lifespan[0] <= result.timestamps[0] <= result.lifespan[1]
    assert (
        model.generate_batch(PROMPTS[:1], greedy(), max_new_tokens=2)["req_0"].generated_tokens
        == (expected(own, PROMPTS[0])[:2])
    )
    assert model.generate_batch([]) == {}


def test_several_sequences_and_logprobs(pair):
    own, model = pair
    config = GenerationConfig(
        max_new_tokens=6, do_sample=True, temperature=0.8, top_k=9, eos_token_id=None, num_return_sequences=3
    )
    sizes = ContinuousBatchingConfig(return_logprobs=True, seed=5, page_size=8, max_batch_tokens=64, num_blocks=40)
    results = model.generate_batch(PROMPTS[:2], config, sizes)
    assert sorted(results) == sorted(f"req_{at}{child}" for at in (0, 1) for child in ("", "__child#0", "__child#1"))
    assert len({tuple(result.generated_tokens) for result in results.values()}) > 2
    again = model.generate_batch(PROMPTS[:2], config, sizes)
    assert [one.generated_tokens for one in again.values()] == [one.generated_tokens for one in results.values()]
    for result in results.values():
        ids = torch.tensor([result.prompt_ids + result.generated_tokens])
        logits = own(ids).logits[0, len(result.prompt_ids) - 1 : -1] / 0.8
        least = logits.topk(9).values[:, -1:]
        wanted = logits.masked_fill(logits < least, -torch.inf).log_softmax(-1)
        got = torch.tensor(result.logprobs)
        sampled = torch.tensor(result.generated_tokens)[:, None]
        torch.testing.assert_close(got, wanted.gather(1, sampled)[:, 0], rtol=1e-4, atol=1e-4)


def test_the_manager_streams_cancels_pauses_and_stops(pair):
    own, model = pair
    manager = model.init_continuous_batching(greedy(max_new_tokens=300))
    assert isinstance(manager, EngineManager)
    manager.start()
    try:
        name = manager.add_request(PROMPTS[0], max_new_tokens=5, streaming=True)
        parts = list(manager.request_id_iter(name))
        full = expected(own, PROMPTS[0])[:5]
        assert [part.generated_tokens for part in parts] == [full[: at + 1] for at in range(5)]
        assert [part.status for part in parts] == [RequestStatus.DECODING] * 4 + [RequestStatus.FINISHED]
        named = manager.add_request(PROMPTS[1], request_id="mine", max_new_tokens=4, eos_token_id=-1)
        assert named == "mine"
        assert manager.get_result("mine", timeout=60).generated_tokens == expected(own, PROMPTS[1])[:4]
        penalised_id = manager.add_request(PROMPTS[1], max_new_tokens=3, repetition_penalty=1.7)
        penalised = expected(own, PROMPTS[1], repetition_penalty=1.7)[:3]
        assert manager.get_result(penalised_id, timeout=60).generated_tokens == penalised
        long = manager.add_request(PROMPTS[2], max_new_tokens=300)
        manager.cancel_request(long)
        cancelled = manager.get_result(long, timeout=60)
        assert (cancelled.status, cancelled.error) == (RequestStatus.FAILED, "cancelled")
        manager.add_request(PROMPTS[2], max_new_tokens=300)
        with manager.pause():
            steps = manager.engine.stats()["num_steps"]
            assert manager.get_result(timeout=0.2) is None
            assert manager.engine.stats()["num_steps"] == steps
        too_long = manager.add_request(list(range(3, 330)) * 2)
        assert ", got 654." in manager.get_result(too_long, timeout=60).error
        with pytest.raises(
            ToolkitError, match=r"a sampling argument of add_request must be one of .*, got 'typical_p'"
        ):
            manager.add_request(PROMPTS[0], typical_p=0.5)
    finally:
        manager.stop(hard_stop=True)
    stopped = list(manager)
    assert [(one.status, one.error) for one in stopped] == [(RequestStatus.FAILED, "cancelled")]
    assert not manager.is_running()
    assert manager.add_request(PROMPTS[0]) is None
    with pytest.raises(ToolkitError, match="not running"), manager.pause():
        pass


def test_results_on_an_event_loop(pair):
    own, model = pair

    async def collect(manager):
        seen, done = [], asyncio.Event()
        manager.register_result_handler("here", lambda one: (seen.append(one), one.is_finished() and done.set()))
        manager.add_request(PROMPTS[0], request_id="here", streaming=True)
        await asyncio.wait_for(done.wait(), 60)
        return seen

    with model.continuous_batching_context_manager(greedy()) as manager:
        seen = asyncio.run(collect(manager))
        assert manager.get_result(timeout=0) is None
    assert len(seen) == 8
    assert seen[-1].generated_tokens == expected(own, PROMPTS[0])


def test_a_manager_that_is_kept(pair):
    _, model = pair
    first = model.generate_batch(PROMPTS, greedy(), persistent_manager=True)
    kept = model._cached_continuous_batching_manager
    steps = kept.engine.stats()["num_steps"]
    second = model.generate_batch(PROMPTS[:1] * 3, greedy(), persistent_manager=True)
    assert model._cached_continuous_batching_manager is kept
    assert kept.engine.stats()["num_steps"] > steps
    assert {tuple(one.generated_tokens) for one in second.values()} == {tuple(first["req_0"].generated_tokens)}
    model.destroy_cached_continuous_batching_manager()
    assert "_cached_continuous_batching_manager" not in model.__dict__


def test_what_the_engine_does_not_do_is_an_error_by_name(pair):
    _, model = pair
    for name, value in {"num_beams": 2, "stop_strings": "x", "bad_words_ids": [[4]], "no_repeat_ngram_size": 2}.items():
        with pytest.raises(ToolkitError, match=name):
            model.generate_batch(PROMPTS, greedy(**{name: value}))
    with pytest.raises(ToolkitError, match="generate_batch has no argument 'do_sample'"):
        model.generate_batch(PROMPTS, greedy(), do_sample=True)
    with pytest.raises(ToolkitError, match="max_queue_size must be 0 on the engine, got 3"):
        model.init_continuous_batching(greedy(), ContinuousBatchingConfig(max_queue_size=3))
    with pytest.raises(ToolkitError, match="routed already"):
        route_continuous_batching(model)
    with pytest.raises(ToolkitError, match="not patched"):
        route_continuous_batching(random_model("llama"))


def test_the_way_out():
    model = random_model("llama")
    toolkit.patch(model)
    attributes = dict(model.__dict__)
    with pytest.raises(ToolkitError, match="num_page"):
        route_continuous_batching(model, num_page=16)
    route = route_continuous_batching(model, num_blocks=16)
    with pytest.raises(ValueError, match="toolkit is not supported"):  # transformers' own, which knows few attentions
        copy.deepcopy(model).init_continuous_batching(greedy())
    assert set(model.__dict__) > set(attributes)
    model.generate_batch(PROMPTS[:1], greedy(), persistent_manager=True)
    route.undo()
    route.undo()
    assert model.__dict__ == attributes
