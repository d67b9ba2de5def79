"""Routing that the engine records: complete and correct under any schedule, and absent unless asked for."""

from typing import Any

import pytest
import torch

import toolkit
from tests.helpers.recorded_schedules import completions_under, prompts, under_limits
from toolkit.engine import Engine, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.moe.observer import observing
from toolkit.patching import state_spec
from toolkit.patching.forward import ragged_forward
from toolkit.state import RaggedBatch, StateSpec
from toolkit.testing.models import random_model

LAYERS, K = 2, 3


@pytest.fixture(scope="module")
def model() -> Any:
    found = random_model("qwen3_moe")
    toolkit.patch(found)
    return found


def own_routing(model: Any, tokens: list[int]) -> torch.Tensor:
    """[tokens, L, K]: what the routers choose for a sequence alone, without an engine."""
    seen: dict[int, torch.Tensor] = {}

    def observer(layer: int, logits: torch.Tensor, ids: torch.Tensor, *_: object) -> None:
        seen[layer] = ids

    with observing(observer), torch.no_grad():
        ragged_forward(model, RaggedBatch.from_sequences([tokens]))
    return torch.stack([seen[layer] for layer in range(LAYERS)], 1).int()


def check(model: Any, completions: list[Any]) -> None:
    for one in completions:
        tokens = [*one.prompt_token_ids, *one.token_ids][:-1]
        assert one.routed_experts is not None
        assert one.routed_experts.dtype == torch.int32
        assert not one.routed_experts.is_inference()
        assert torch.equal(one.routed_experts, own_routing(model, tokens))


@under_limits
def test_it_is_that_of_every_sequence_alone(model: Any, limits: dict[str, Any]) -> None:
    check(model, completions_under(model, "enable_return_routed_experts", limits))


def test_it_is_that_of_transformers_own_router(model: Any) -> None:
    stock = random_model("qwen3_moe")
    stock.set_attn_implementation("eager")
    with Engine(model, enable_return_routed_experts=True) as engine:
        completions = engine.generate(prompts(3, 5), SamplingParams(max_tokens=6, ignore_eos=True, seed=1))
    for one in completions:
        tokens = [*one.prompt_token_ids, *one.token_ids][:-1]
        with torch.no_grad():
            logits = stock(torch.tensor([tokens]), output_router_logits=True, use_cache=False).router_logits
        expected = torch.stack([layer.topk(K).indices for layer in logits], 1)
        assert torch.equal(one.routed_experts.long(), expected)


def test_a_sleep_and_a_prefix_hit_in_between_lose_nothing(model: Any) -> None:
    prompt = prompts(5, 1)[0] * 3
    params = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.0)
    with Engine(model, enable_return_routed_experts=True, block_size=4) as engine:
        for _ in range(3):
            engine.submit(prompt, params)
        found = []
        while engine.has_work:
            found += [delta.finished for delta in engine.step() if delta.finished is not None]
            engine.sleep()
            engine.wake()
        before = engine.stats()["prefix_cache_hits"]
        found += engine.generate([prompt], params)
        again = engine.generate([prompt], params)
        assert engine.stats()["prefix_cache_hits"] > before
    check(model, [*found, *again])


def test_it_is_of_the_weights_that_computed_it() -> None:
    model = random_model("qwen3_moe", seed=3)
    toolkit.patch(model)
    prompt = prompts(7, 1)[0] * 2
    params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0)
    with Engine(model, enable_return_routed_experts=True, block_size=4) as engine:
        first = engine.generate([prompt], params)
        check(model, first)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        second = engine.generate([prompt], params)
        check(model, second)
    assert not torch.equal(first[0].routed_experts[: len(prompt)], second[0].routed_experts[: len(prompt)])


def test_single_tokens_and_ends_before_the_last(model: Any) -> None:
    with Engine(model, enable_return_routed_experts=True, max_num_seqs=1) as engine:
        one = engine.generate([[5]], SamplingParams(max_tokens=1, ignore_eos=True))
        assert one[0].routed_experts.shape == (1, LAYERS, K)
        check(model, one)
        running = engine.submit([5, 6, 7], SamplingParams(max_tokens=50, ignore_eos=True))
        waiting = engine.submit([5, 6, 8], SamplingParams(max_tokens=50, ignore_eos=True))
        for _ in range(4):
            engine.step()
        engine.cancel(running)
        engine.cancel(waiting)
        ended = {delta.request_id: delta.finished for delta in engine.step() if delta.finished is not None}
        assert ended[waiting].routed_experts is None
        assert ended[running].finish_reason == "cancelled"
        check(model, [ended[running]])


def test_it_is_kept_only_when_asked_for(model: Any) -> None:
    assert state_spec(model)[-LAYERS:] == [StateSpec(at, "routing", ((1, K),)) for at in range(LAYERS)]
    params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0)
    with Engine(model) as plain, Engine(model, enable_return_routed_experts=True) as recording:
        assert [spec.kind for spec in plain.pool.specs] == ["full"] * LAYERS
        first, second = plain.generate([[5, 6]], params), recording.generate([[5, 6]], params)
    assert first[0].routed_experts is None
    assert [(one.token_ids, one.logprobs) for one in first] == [(one.token_ids, one.logprobs) for one in second]


def test_it_cannot_be_asked_of_a_dense_model(model: Any) -> None:
    with pytest.raises(ToolkitError, match="routed_experts must be False for a model without a patched layer"):
        Engine(random_model("llama"), enable_return_routed_experts=True)
    with pytest.raises(ToolkitError, match="enable_return_routed_experts must be True or False, got 'yes'"):
        Engine(model, enable_return_routed_experts="yes")
