"""Selected keys that the engine records: complete under any schedule, absent unless asked for, replayed bit for bit."""

import copy
from typing import Any

import pytest
import torch

import toolkit
from tests.helpers.recorded_schedules import completions_under, prompts, under_limits
from toolkit.engine import Engine, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.patching import state_spec
from toolkit.patching.forward import context_forward
from toolkit.state import RaggedBatch, StateSpec
from toolkit.state.dense import DenseContext
from toolkit.testing.architectures import small_model
from toolkit.testing.models import random_model
from toolkit.testing.oracle import eager, lifted_to_double

pytest.importorskip("transformers.models.deepseek_v32", reason="needs a transformers with DeepSeek-V3.2")

LAYERS, K = 2, 8


@pytest.fixture(scope="module")
def model() -> Any:
    found = small_model("deepseek_v32")
    toolkit.patch(found)
    return found


def own_selection(model: Any, tokens: list[int]) -> torch.Tensor:
    """[tokens, L, K]: what the indexers choose for a sequence alone, without an engine."""
    context = DenseContext(RaggedBatch.from_sequences([tokens]))
    context.selections.keep = True
    with torch.no_grad():
        context_forward(model, context)
    kept = context.selections.kept().transpose(0, 1)
    return torch.nn.functional.pad(kept, (0, K - kept.shape[2]), value=-1)


def check(model: Any, completions: list[Any]) -> None:
    for one in completions:
        tokens = [*one.prompt_token_ids, *one.token_ids][:-1]
        assert one.selected_keys is not None
        assert one.selected_keys.dtype == torch.int32
        assert not one.selected_keys.is_inference()
        assert torch.equal(one.selected_keys.long(), own_selection(model, tokens))


def sequences_of(completions: list[Any]) -> list[list[int]]:
    return [[*one.prompt_token_ids, *one.token_ids] for one in completions]


def gradients(model: Any, logprobs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.stack([(one * torch.linspace(1, 2, len(one)).to(one.dtype)).sum() for one in logprobs]).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@under_limits
def test_it_is_that_of_every_sequence_alone(model: Any, limits: dict[str, Any]) -> None:
    check(model, completions_under(model, "enable_return_selected_keys", limits))


def test_it_is_that_of_transformers_own_indexer(model: Any) -> None:
    stock = small_model("deepseek_v32")
    stock.set_attn_implementation("eager")
    with Engine(model, enable_return_selected_keys=True) as engine:
        completions = engine.generate(prompts(3, 4), SamplingParams(max_tokens=6, ignore_eos=True, seed=1))
    seen: list[torch.Tensor] = []
    for name, module in stock.named_modules():
        if name.endswith(".indexer"):
            module.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    for one in completions:
        tokens, seen[:] = sequences_of([one])[0][:-1], []
        with torch.no_grad():
            stock(torch.tensor([tokens]), use_cache=False)
        assert len(seen) == LAYERS
        for layer, chosen in enumerate(seen):
            for at, row in enumerate(chosen.tolist()):  # of few keys it selects hidden ones too, which are masked
                mine = {key for key in one.selected_keys[at, layer].tolist() if key >= 0}
                assert mine == {key for key in row if key <= at}


def test_replay_has_the_engines_bits_and_its_gradients(model: Any) -> None:
    with Engine(model, enable_return_selected_keys=True, enable_return_routed_experts=True) as engine:
        params = SamplingParams(n=2, max_tokens=9, ignore_eos=True, seed=1)
        completions = engine.generate(prompts(1, 3), params)
    sequences, last = sequences_of(completions), [9] * len(completions)
    recorded = {
        "selection": [one.selected_keys for one in completions],
        "routing": [one.routed_experts for one in completions],
    }
    for given in ({"selection": recorded["selection"]}, recorded):
        for share in (True, False):
            replayed = toolkit.token_logprobs(model, sequences, share, last, **given)
            for one, values in zip(completions, replayed):
                assert values.tolist() == one.logprobs
    whole = [own_selection(model, one) for one in sequences]  # with the last token's, which no loss reads
    fresh = gradients(model, toolkit.token_logprobs(model, sequences, last=last))
    same = gradients(model, toolkit.token_logprobs(model, sequences, last=last, selection=whole))
    assert fresh.keys() == same.keys()
    assert all(torch.equal(same[name], gradient) for name, gradient in fresh.items())


def test_after_a_weight_write_the_recorded_keys_are_attended(model: Any) -> None:
    """Against transformers' own forward with its indexers' choice replaced, in float64, with all gradients."""
    with Engine(model, enable_return_selected_keys=True) as engine:
        params = SamplingParams(n=2, max_tokens=9, ignore_eos=True, seed=1)
        completions = engine.generate(prompts(2, 2), params)
    sequences, recorded = sequences_of(completions), [one.selected_keys for one in completions]
    stock = eager(small_model("deepseek_v32").double())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    written = copy.deepcopy(stock)
    toolkit.patch(written)
    changed = [own_selection(written, one)[:-1] for one in sequences]
    assert any(not torch.equal(mine, then.long()) for mine, then in zip(changed, recorded))
    current: dict[str, torch.Tensor] = {}

    def forced(layer: int) -> Any:
        def forward(hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            chosen = current["selection"][None, :, layer].long()
            return torch.where(chosen < 0, chosen[..., :1], chosen)  # its own way has no -1

        return forward

    indexers = [module for name, module in stock.named_modules() if name.endswith(".indexer")]
    for layer, indexer in enumerate(indexers):
        indexer.forward = forced(layer)
    exact = []
    with lifted_to_double():
        for sequence, keys in zip(sequences, recorded):
            current["selection"] = torch.cat([keys, keys[-1:]])  # the last token's, which nothing reads
            logits = stock(torch.tensor([sequence]), use_cache=False).logits[0, :-1]
            exact.append(logits.log_softmax(-1).gather(1, torch.tensor(sequence[1:])[:, None])[:, 0])
        wanted = gradients(stock, exact)
        assert RaggedBatch.from_sequences(sequences, selection=recorded).multiplicity is not None
        for share in (True, False):
            replayed = toolkit.token_logprobs(written, sequences, share, selection=recorded)
            for one, other in zip(replayed, exact):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
            found = gradients(written, replayed)
            assert set(found) == set(wanted)
            for name, gradient in wanted.items():
                assert (found[name] - gradient).norm() <= 1e-9 * gradient.norm(), name
        fresh = toolkit.token_logprobs(written, sequences)
    assert max(float((one - other).detach().abs().max()) for one, other in zip(fresh, exact)) > 1e-3


def test_fewer_keys_than_are_selected_fit_the_longest_sequence() -> None:
    """No state is kept for keys that no sequence has, and another number of columns changes no bit."""
    model = small_model("deepseek_v32", index_topk=64)
    toolkit.patch(model)
    with Engine(model, enable_return_selected_keys=True, max_model_len=40, max_num_batched_tokens=7) as engine:
        assert {spec.shapes for spec in engine.pool.specs if spec.kind == "selection"} == {((1, 40),)}
        completions = engine.generate(
            [list(range(5, 25)), [7], [9, 8, 7]], SamplingParams(max_tokens=9, ignore_eos=True)
        )
    for one in completions:
        at = torch.arange(len(one.selected_keys))[:, None, None]
        column = torch.arange(40)
        assert torch.equal(one.selected_keys.long(), torch.where(column <= at, column, -1).expand(-1, LAYERS, -1))
        tokens = sequences_of([one])
        values = toolkit.token_logprobs(model, tokens, last=[9], selection=[one.selected_keys])
        assert values[0].tolist() == one.logprobs


def test_it_is_kept_only_when_asked_for(model: Any) -> None:
    specs = [spec for spec in state_spec(model) if spec.kind == "selection"]
    assert specs == [StateSpec(at, "selection", ((1, K),)) for at in range(LAYERS)]
    params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0)
    with Engine(model) as plain, Engine(model, enable_return_selected_keys=True) as recording:
        assert "selection" not in {spec.kind for spec in plain.pool.specs}
        first, second = plain.generate([[5, 6]], params), recording.generate([[5, 6]], params)
    assert first[0].selected_keys is None
    assert [(one.token_ids, one.logprobs) for one in first] == [(one.token_ids, one.logprobs) for one in second]


def test_it_cannot_be_asked_of_a_model_without_an_indexer(model: Any) -> None:
    with pytest.raises(ToolkitError, match="selected_keys must be False for a model without a patched layer of sparse"):
        Engine(random_model("llama"), enable_return_selected_keys=True)
    with pytest.raises(ToolkitError, match="enable_return_selected_keys must be True or False, got 'yes'"):
        Engine(model, enable_return_selected_keys="yes")


def test_what_cannot_be_replayed_is_one_sentence(model: Any) -> None:
    sequence = [5, 6, 7, 8]
    good = own_selection(model, sequence)[:3].int()

    def refused(*selection: torch.Tensor) -> str:
        with pytest.raises(ToolkitError) as caught:
            toolkit.token_logprobs(model, [sequence], selection=selection)
        return str(caught.value)

    assert "selection must have a tensor for each of 1 sequences, got 2." in refused(good, good)
    assert "got shape [2, 2, 8]" in refused(good[:2])
    assert "got shape [3, 16]" in refused(good.flatten(1))
    assert "dtype torch.float32" in refused(good.float())
    assert "positions of selection[0] must be <= 0 for token 0, got 1." in refused(good + (good >= 0).int())
    assert "positions of selection[0] must differ for token 0, got 0 twice in layer 0." in refused(good * 0)
    assert "selection must have each of the model's indexers, got 1." in refused(good[:, :1])
    assert "selection must be taken by an indexer in each of its 4 layers, got 2." in refused(good.repeat(1, 2, 1))
    with pytest.raises(
        ToolkitError, match=r"selection\[1\] must have the layers and keys of .*, got shape \[1, 1, 8\]"
    ):
        toolkit.token_logprobs(model, [sequence, [5, 6]], selection=[good, good[:1, :1]])
    dense = random_model("llama")
    toolkit.patch(dense)
    with pytest.raises(ToolkitError, match=r"taken by an indexer in each of its 2 layers, got 0"):
        toolkit.token_logprobs(dense, [sequence], selection=[good])
