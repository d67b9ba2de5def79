"""Adapters on embeddings and heads, and trainable token indices, against PEFT on the unpatched model."""

import copy
from functools import cache

import pytest
import torch

import toolkit
from tests.helpers.allocations import allocated_bytes
from tests.train_patches.test_peft import loss_and_gradients, relative
from toolkit.patching.adapters import FUSED, adapter_report
from toolkit.testing.models import from_config, random_model
from toolkit.training.losses import divergence_estimate

peft = pytest.importorskip("peft")

CONFIGS = {
    "lora": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "tokens of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4, 7]},
    },
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}
PROMPTS = [[1, 5, 9, 3, 11, 4, 8, 2, 7, 6, 5, 4, 3, 9, 10, 12, 5, 5], [1, 5, 9, 3, 3, 7]]
PARAMS = toolkit.SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


@cache
def base(tied, patched):
    model = random_model("llama", tie_word_embeddings=tied)
    if patched:
        toolkit.patch(model)
    return model


def adapted(model, config, *names):
    """``model`` with one adapter, or some named ones, that do something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for at, name in enumerate(names or ("default",)):
            one = peft.LoraConfig(r=4, **config)
            if at:
                model.add_adapter(name, one)
            else:
                model = peft.get_peft_model(model, one, adapter_name=name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if any(part in key for part in ("lora_", "trainable_tokens_delta", "modules_to_save")):
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def logprobs(model, sequence):
    logits = model(input_ids=torch.tensor([sequence])).logits[0].log_softmax(-1)
    return logits[torch.arange(len(sequence) - 1), torch.tensor(sequence[1:])]


def agree(engine, model, stock):
    """Engine and training agree in every bit, and both with PEFT; the sequences."""
    completions = engine.generate(PROMPTS, PARAMS)
    sequences = [one.prompt_token_ids + one.token_ids for one in completions]
    for one, trained in zip(completions, toolkit.token_logprobs(model, sequences), strict=True):
        assert torch.equal(torch.tensor(one.logprobs), trained.detach()[-5:])
        expected = logprobs(stock, one.prompt_token_ids + one.token_ids)
        torch.testing.assert_close(trained, expected, atol=2e-5, rtol=2e-5)
    return sequences


@pytest.mark.parametrize(("tied", "first"), [(False, "adapters"), (True, "patch")])
@pytest.mark.parametrize("case", CONFIGS)
def test_values_and_gradients_are_pefts_own(case, tied, first):
    stock = adapted(copy.deepcopy(base(tied, False)), CONFIGS[case])
    model = adapted(copy.deepcopy(base(tied, first == "patch")), CONFIGS[case])
    toolkit.patch(model)
    with toolkit.Engine(model.eval(), num_blocks=64) as engine:
        sequences = agree(engine, model, stock)
        with model.disable_adapter(), stock.disable_adapter():
            agree(engine, model, stock)
        agree(engine, model, stock)
    found = []
    for one, terms in ((model, toolkit.token_logprobs), (stock, lambda _, rows: [logprobs(stock, r) for r in rows])):
        gradients = [loss_and_gradients(one)[1]]
        one.zero_grad()
        (-torch.cat(terms(one, sequences)).sum()).backward()
        found.append([*gradients, {name: p.grad for name, p in one.named_parameters() if p.grad is not None}])
    for got, expected in zip(*found, strict=True):
        assert set(got) == set(expected) != set()
        for name, gradient in got.items():
            assert relative(gradient, expected[name]) < 1e-4, name


def test_a_switch_back_finds_the_prefixes_of_that_adapter_again():
    config = CONFIGS["lora"]
    stock = adapted(copy.deepcopy(base(False, False)), config, "one", "two")
    model = adapted(copy.deepcopy(base(False, True)), config, "one", "two")
    with toolkit.Engine(model.eval(), num_blocks=64) as engine:
        hits, keys = [], []
        for name in ("one", "two", None, "one", "two", None):
            for each in (model, stock):
                each.base_model.enable_adapter_layers() if name else each.base_model.disable_adapter_layers()
                if name:
                    each.set_adapter(name)
            before = engine.stats()["prefix_cache_hits"]
            agree(engine, model, stock)
            hits.append(engine.stats()["prefix_cache_hits"] - before)
            keys.append(engine.backend.prefix_key())
        assert hits[:3] == [0, 0, 0]
        assert min(hits[3:]) > 0
        assert keys[:3] == keys[3:]
        assert [key.adapter for key in keys[:3]] == ["one", "two", None]
        # A write to one adapter drops its own prefixes and nobody else's.
        for each in (model, stock):
            with torch.no_grad():
                each.base_model.model.model.embed_tokens.lora_embedding_A["one"].mul_(1.1)
            each.base_model.enable_adapter_layers()
        for name, found in (("two", True), ("one", False), ("one", True)):
            for each in (model, stock):
                each.set_adapter(name)
            before = engine.stats()["prefix_cache_hits"]
            agree(engine, model, stock)
            assert (engine.stats()["prefix_cache_hits"] > before) == found
        engine.check_integrity()


def test_added_merged_and_deleted_adapters_are_noticed():
    model, stock = (adapted(copy.deepcopy(base(True, patched)), CONFIGS["lora"]) for patched in (True, False))
    versions = []
    with toolkit.Engine(model.eval(), num_blocks=64) as engine:
        for change in (
            lambda one: None,
            lambda one: one.merge_adapter(),
            lambda one: one.unmerge_adapter(),
            lambda one: adapted_again(one),
            lambda one: one.delete_adapter("more"),
        ):
            for each in (model, stock):
                change(each)
            agree(engine, model, stock)
            versions.append(engine.stats()["weight_version"])
    assert len(set(versions[:4])) == 4


def adapted_again(model):
    model.add_adapter("more", peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "embed_tokens"]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".more" in key:
                parameter.copy_(0.1 * torch.ones_like(parameter).cumsum(-1).sin())
    model.set_adapter("more")


def test_the_reference_of_an_adapted_policy_is_the_model_without_it():
    """As DPO and GRPO take it: adapters disabled, on the same module objects."""
    stock = adapted(copy.deepcopy(base(True, False)), CONFIGS["tokens"])
    model = adapted(copy.deepcopy(base(True, True)), CONFIGS["tokens"])
    policy = toolkit.token_logprobs(model, PROMPTS)
    with torch.no_grad(), model.disable_adapter():
        reference = toolkit.token_logprobs(model, PROMPTS)
    plain = [logprobs(base(True, False), row) for row in PROMPTS]
    for got, expected in zip(reference, plain, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    divergence_estimate(torch.cat(reference) - torch.cat(policy)).mean().backward()
    with torch.no_grad(), stock.disable_adapter():
        fixed = torch.cat([logprobs(stock, row) for row in PROMPTS])
    divergence_estimate(fixed - torch.cat([logprobs(stock, row) for row in PROMPTS])).mean().backward()
    pairs = [
        (p.grad, q.grad) for p, q in zip(model.parameters(), stock.parameters(), strict=True) if q.grad is not None
    ]
    assert pairs
    assert all(relative(got, expected) < 1e-3 for got, expected in pairs)


@pytest.mark.parametrize("where", ["embed_tokens", "lm_head"])
def test_trained_rows_cost_what_they_are_and_not_the_vocabulary(where):
    """PEFT copies the whole weight in every forward."""
    cost = []
    for vocabulary in (256, 8192):
        model = random_model("llama", vocabulary=vocabulary)
        config = {"target_modules": ["q_proj"], "trainable_token_indices": {where: [3, 5]}}
        model = adapted(model, config).eval()
        toolkit.patch(model)
        layer = model.get_submodule(f"base_model.model.{'' if where == 'lm_head' else 'model.'}{where}")
        x = torch.randn(1, 64) if where == "lm_head" else torch.tensor([[3, 7]])
        with torch.no_grad():
            cost.append(allocated_bytes(lambda layer=layer, x=x: layer(x))[0])
    logits = 0 if where == "embed_tokens" else 3 * 4 * (8192 - 256)
    assert cost[1] <= cost[0] + logits


def test_trained_rows_of_a_scaled_embedding_by_either_adapter():
    from transformers import AutoConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
    stock = from_config(AutoConfig.for_model("gemma3_text", **sizes, **heads))
    for at, name in enumerate(("one", "two")):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3 + at, 9 + at])
        stock = stock.add_adapter(name, config) or stock if at else peft.get_peft_model(stock, config, name)
    with torch.no_grad():
        for key, parameter in stock.named_parameters():
            if "trainable_tokens_delta" in key:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model = copy.deepcopy(stock)
    toolkit.patch(model)
    assert all(verdict == FUSED for path, verdict in adapter_report(model) if path.endswith("token_adapter"))
    ids = torch.tensor([[3, 4, 9, 10, 20, 3]])
    for name in ("one", "two"):
        found = []
        for one in (stock, model):
            one.zero_grad()
            one.set_adapter(name)
            loss = one(input_ids=ids, labels=ids).loss
            loss.backward()
            found.append((loss.detach(), {key: p.grad for key, p in one.named_parameters() if p.grad is not None}))
        (expected_loss, expected), (loss, gradients) = found
        assert relative(loss, expected_loss) < 1e-6
        assert set(gradients) == set(expected)
        for key, gradient in expected.items():
            assert relative(gradients[key], gradient) < 1e-4, key
