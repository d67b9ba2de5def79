"""Adapters that are deleted, written, trained with dropout or moved while requests choose them."""

import copy

import pytest
import torch

from tests.helpers.adapter_folders import oracle_logprobs, save_adapter
from toolkit import Engine, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model

peft = pytest.importorskip("peft")

PROMPT = [3 + (7 + 5 * at) % 290 for at in range(40)]
GREEDY = {"max_tokens": 5, "temperature": 0}
SMALL = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def adapted(family="llama", **options):
    """A model with an adapter of each name, the first of which is active."""
    torch.manual_seed(0)
    model = None
    for name, one in options.items():
        config = peft.LoraConfig(**{**SMALL, **one})
        if model is None:
            model = peft.get_peft_model(random_model(family), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model


def completed(engine, name=None, **options):
    return engine.generate([PROMPT], SamplingParams(**{**GREEDY, **options}, lora_name=name))[0]


def outcome(completion):
    return completion.token_ids, completion.logprobs


def write(model, name):
    factors = [one for path, one in model.named_parameters() if f"v_proj.lora_B.{name}." in path]
    with torch.no_grad():
        factors[0].mul_(3)


def test_two_engines_of_a_model_each_see_writes_to_what_they_chose():
    model = adapted(a={}, b={}, c={})
    model.set_adapter("c")
    with Engine(model) as first, Engine(model) as second:
        before = completed(first, "a")
        completed(second, "b")
        write(model, "a")
        after = completed(first, "a")
        first.reset_prefix_cache()
        assert outcome(after) == outcome(completed(first, "a")) != outcome(before)


@pytest.mark.parametrize("whole", [False, True])
def test_a_deleted_adapter_ends_its_requests_alone(whole):
    model = adapted(a={}, b={})
    with Engine(model) as engine:
        params = [SamplingParams(**GREEDY, lora_name=name) for name in ("b", None)]
        lost, kept = (engine.submit(PROMPT, one) for one in params)
        engine.step()
        if whole:
            model.merge_and_unload(adapter_names=["a"])
        else:
            model.delete_adapter("b")
        done = {}
        while engine.has_work:
            done |= {delta.request_id: delta.finished for delta in engine.step() if delta.finished}
        assert done[lost].error == "adapter 'b' must stay in the model until its requests end."
        assert done[kept].finish_reason == "length"
        with pytest.raises(ToolkitError, match="lora_name must be"):
            completed(engine, "b")
        engine.check_integrity()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_an_adapter_that_is_merged_ends_its_requests_alone(family):
    model = adapted(family, a={}, b={})
    other = copy.deepcopy(model)  # the same by hand: what is merged is written into the weights, and gone
    for module in other.modules():
        if hasattr(module, "get_delta_weight") and "a" in module.lora_A:
            module.base_layer.weight.data += module.get_delta_weight("a")
    other.delete_adapter("a")
    with Engine(model) as engine, Engine(other) as plain:
        before = completed(engine, "a")
        lost, *kept = [engine.submit(PROMPT, SamplingParams(**GREEDY, lora_name=name)) for name in ("a", "b", None)]
        engine.step()
        model.merge_adapter(["a"])
        done = {}
        while engine.has_work:
            done |= {delta.request_id: delta.finished for delta in engine.step() if delta.finished}
        assert done[lost].error == "adapter 'a' must not be merged while requests choose it."
        assert [done[one].finish_reason for one in kept] == ["length", "length"]
        with pytest.raises(ToolkitError, match=r"adapter 'a' must be LoRA .* has it merged into its weight; unmerge"):
            completed(engine, "a")
        assert outcome(completed(engine, "b")) == outcome(completed(plain, "b"))
        assert outcome(completed(engine)) != outcome(completed(engine, "b"))
        model.unmerge_adapter()
        again = completed(engine, "a")
        assert again.token_ids == before.token_ids
        torch.testing.assert_close(torch.tensor(again.logprobs), torch.tensor(before.logprobs))
        engine.check_integrity()


def test_an_adapter_of_an_unchanged_folder_keeps_its_version(tmp_path):
    model = random_model("llama")
    folders = {name: save_adapter(model, tmp_path / name, seed) for seed, name in enumerate("ab")}
    with Engine(model, max_loras=1, max_cpu_loras=1) as engine:
        for name, folder in folders.items():
            engine.load_adapter(name, folder)
        first = completed(engine, "a")
        for changed in (False, True):
            completed(engine, "b")  # "a" is read again then
            hits = engine.stats()["prefix_cache_hits"]
            again = completed(engine, "a")
            assert (again.weight_version == first.weight_version) is not changed
            assert (engine.stats()["prefix_cache_hits"] > hits) is not changed
            assert (outcome(again) == outcome(first)) is not changed
            save_adapter(model, folders["a"], seed=7)


@pytest.mark.parametrize("where", ["model", "host", "folder"])
def test_an_adapter_that_is_loaded_over_itself_keeps_its_version(where, tmp_path):
    model = random_model("llama")
    folders = {name: save_adapter(model, tmp_path / name, seed) for seed, name in enumerate("ab")}
    bounds = {"model": {}, "host": {"max_loras": 1}, "folder": {"max_loras": 1, "max_cpu_loras": 1}}[where]
    with Engine(model, **bounds) as engine:
        for name, folder in folders.items():
            engine.load_adapter(name, folder)
        first = completed(engine, "a")
        completed(engine, "b")
        engine.load_adapter("a", folders["a"], load_inplace=True)
        again = completed(engine, "a")
        assert (outcome(again), again.weight_version) == (outcome(first), first.weight_version)
        engine.load_adapter("a", folders["b"], load_inplace=True)
        other = completed(engine, "a")
        assert other.weight_version != first.weight_version
        assert outcome(other) == outcome(completed(engine, "b")) != outcome(first)


def test_lora_and_dora_follow_each_other_under_one_name(tmp_path):
    """Of each the bits are those that it has in another engine, and nothing is left of the one before."""
    model = random_model("llama")
    kinds = {"dora": {"use_dora": True}, "lora": {}, "other": {"use_dora": True, "rank": 8}}
    folders = {name: save_adapter(model, tmp_path / name, at, **one) for at, (name, one) in enumerate(kinds.items())}
    alone = {}
    for name, folder in folders.items():
        with Engine(random_model("llama")) as engine:
            engine.load_adapter("a", folder)
            alone[name] = outcome(completed(engine, "a"))
    with Engine(model) as engine:
        for at, name in enumerate(("dora", "lora", "other", "dora", "lora")):
            engine.load_adapter("a", folders[name], load_inplace=at > 0)
            assert outcome(completed(engine, "a")) == alone[name]
        engine.unload_adapter("a")
        engine.load_adapter("a", folders["other"])
        assert outcome(completed(engine, "a")) == alone["other"]


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_never_acts_in_an_engine(dora, tmp_path):
    model = random_model("llama")
    folder = save_adapter(model, tmp_path / "a", rank=4, use_dora=dora, lora_dropout=0.5)
    own = peft.PeftModel.from_pretrained(random_model("llama"), str(folder), "a")
    with Engine(model) as loading, Engine(own) as engine:
        loading.load_adapter("a", folder)
        found = [completed(loading, "a"), completed(engine, "a"), completed(engine)]
        for one in (model, own):
            one.train()
            for each in (loading, engine):
                each.reset_prefix_cache()
            found += [completed(loading, "a"), completed(engine, "a"), completed(engine)]
    assert [*map(outcome, found)] == [outcome(found[0])] * 9
    model = random_model("llama")
    (expected,) = oracle_logprobs(model, folder, [PROMPT + found[0].token_ids])
    torch.testing.assert_close(torch.tensor(found[0].logprobs).double(), expected[-5:], rtol=5e-6, atol=1e-5)


def test_new_adapters_of_a_model_in_eval_mode_are_not_dropped():
    model = adapted(a={"lora_dropout": 0.5})
    with Engine(model.eval()) as engine:
        expected = completed(engine)
        torch.manual_seed(0)
        model.delete_adapter("a")
        model.add_adapter("a", peft.LoraConfig(**SMALL, lora_dropout=0.5))
        model.set_adapter("a")
        assert outcome(completed(engine)) == outcome(expected)
        assert any(module.training for module in model.modules())


def test_modules_that_are_saved_whole_are_not_left_out():
    model = adapted(a={}, b={"modules_to_save": ["lm_head"]})
    with Engine(model) as engine:
        with pytest.raises(ToolkitError, match="adapter 'b' must be LoRA or DoRA that rows can choose, but lm_head"):
            completed(engine, "b")
        completed(engine, "a")


def test_pefts_own_names_stay_theirs(tmp_path):
    folder = save_adapter(random_model("llama"), tmp_path / "a")
    model = adapted(**{"50%": {}, "v1%2E2": {}})
    with Engine(model) as engine:
        expected = completed(engine, "50%"), completed(engine, "v1%2E2")
        with pytest.raises(ToolkitError, match=r"lora_name must be a name that no adapter has, got 'v1\.2'"):
            engine.load_adapter("v1.2", folder)
        engine.load_adapter("v1.3", folder)
        assert [outcome(completed(engine, name)) for name in ("50%", "v1%2E2")] == [*map(outcome, expected)]


def test_evicted_adapters_keep_their_pages_and_versions_until_written(tmp_path):
    model = random_model("llama")
    with Engine(model, max_loras=1) as engine:
        for seed, name in enumerate("ab"):
            engine.load_adapter(name, save_adapter(model, tmp_path / name, seed))
        first = completed(engine, "a")
        for written in (False, True):
            completed(engine, "b")
            hits = engine.stats()["prefix_cache_hits"]
            again = completed(engine, "a")
            assert (engine.stats()["prefix_cache_hits"] > hits) is not written
            assert (again.weight_version == first.weight_version) is not written
            write(model, "a")
            if not written:
                first = again
        engine.reset_prefix_cache()
        assert outcome(completed(engine, "a")) != outcome(again) != outcome(first)


def test_adapters_of_tied_heads_are_loaded(tmp_path):
    model = random_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    folder = save_adapter(model, tmp_path / "a", target_modules=["lm_head", "q_proj"])
    unpatched = copy.deepcopy(model)
    with Engine(model) as engine:
        engine.load_adapter("a", folder)
        found = completed(engine, "a")
        engine.unload_adapter("a")
        assert model.lm_head.weight is model.model.embed_tokens.weight
    (expected,) = oracle_logprobs(unpatched, folder, [PROMPT + found.token_ids])
    torch.testing.assert_close(torch.tensor(found.logprobs).double(), expected[-5:], rtol=5e-6, atol=1e-5)


def test_an_adapter_that_changes_what_layers_remember_is_refused_and_harms_nobody(tmp_path):
    model = random_model("deepseek_v3")
    folder = save_adapter(model, tmp_path / "a", target_modules=["kv_b_proj"])
    with Engine(model) as engine:
        expected = completed(engine)
        with pytest.raises(ToolkitError, match="adapter 'a' must keep what layers remember of a token"):
            engine.load_adapter("a", folder)
        engine.reset_prefix_cache()
        assert outcome(completed(engine)) == outcome(expected)


def test_a_folder_that_has_become_another_kind_is_refused_when_it_is_read_again(tmp_path):
    model = random_model("llama")
    folders = {name: save_adapter(model, tmp_path / name, seed) for seed, name in enumerate("ab")}
    with Engine(model, max_loras=1, max_cpu_loras=1) as engine:
        for name, folder in folders.items():
            engine.load_adapter(name, folder)
        completed(engine, "b")
        save_adapter(random_model("llama"), folders["a"], lora_bias=True)
        assert "adapter 'a' must be LoRA or DoRA that rows can choose" in completed(engine, "a").error
        assert completed(engine, "b").finish_reason == "length"


def test_an_adapter_that_peft_adds_to_other_layers_may_be_chosen_at_once():
    model = adapted(a={})
    with Engine(model) as engine:
        expected = completed(engine, "a")
        model.add_adapter("b", peft.LoraConfig(**{**SMALL, "target_modules": ["o_proj"]}))
        assert outcome(completed(engine, "b")) != outcome(expected) == outcome(completed(engine, "a"))
