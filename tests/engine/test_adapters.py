"""Requests that choose adapters: many in one batch, each with the bits that it has alone, and they come and go."""

import copy
import dataclasses
import itertools
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

import toolkit
from tests.helpers.adapter_folders import EXPERTS, LINEAR, oracle_logprobs, save_adapter
from toolkit import Engine, SamplingParams, token_logprobs
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model

pytest.importorskip("peft")

WEIGHTS = "adapter_model.safetensors"
DENSE = "llama"
MOE = "qwen3_moe"
HYBRID = "qwen3_next"
KINDS = {
    "narrow": {"rank": 4, "target_modules": ["q_proj", "v_proj"]},
    "dora": {"rank": 16, "use_dora": True},
    "whole": {"rank": 8, "target_modules": [*LINEAR, "lm_head", "embed_tokens"]},
    "wide": {"rank": 64, "use_rslora": True},
}


def prompt(number, length=9):
    return [3 + (7 * number + 5 * at) % 290 for at in range(length)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model = random_model(DENSE)
    return {
        name: save_adapter(model, folder / name, seed, **options) for seed, (name, options) in enumerate(KINDS.items())
    }


def engine_with(folders, **options):
    engine = Engine(random_model(DENSE), **options)
    for name, folder in folders.items():
        engine.load_adapter(name, folder)
    return engine


def outcome(completion):
    return completion.token_ids, completion.logprobs, completion.sampling_logprobs


def requests(names, count, **options):
    chosen = list(itertools.islice(itertools.cycle([None, *names]), count))
    return [prompt(at) for at in range(count)], [
        SamplingParams(max_tokens=6 + at % 5, seed=at, lora_name=name, **options) for at, name in enumerate(chosen)
    ]


@pytest.fixture(scope="module")
def alone(folders):
    """What each of ten requests gives in an engine that has its adapter alone."""
    prompts, params = requests(folders, 10)
    found = []
    for one, chosen in zip(prompts, params):
        name = chosen.lora_name
        with engine_with({} if name is None else {name: folders[name]}) as engine:
            found.append(engine.generate([one], chosen)[0])
    return found


def test_a_batch_of_adapters_is_pefts_and_each_has_the_bits_it_has_alone(folders, alone):
    prompts, params = requests(folders, 10)
    with engine_with(folders, max_num_seqs=6) as engine:
        together = engine.generate(prompts, params)
        assert [*map(outcome, together)] == [*map(outcome, alone)]
        sequences = [one.prompt_token_ids + one.token_ids for one in together]
        trained = token_logprobs(
            engine.backend.model,
            sequences,
            last=[len(one.token_ids) for one in together],
            adapters=[one.lora_name for one in params],
        )
        for found, one in zip(trained, together):
            assert torch.equal(found.detach(), torch.tensor(one.logprobs))
    model = random_model(DENSE)
    for name in (None, *folders):
        mine = [at for at, one in enumerate(params) if one.lora_name == name]
        expected = oracle_logprobs(model, folders.get(name), [sequences[at] for at in mine])
        for at, values in zip(mine, expected):
            got = torch.tensor(together[at].logprobs).double()
            torch.testing.assert_close(got, values[-len(got) :], rtol=5e-6, atol=1e-5)  # float32 against float64


@pytest.mark.parametrize("bounds", [(1, None), (2, None), (1, 2), (2, 2)], ids=str)
def test_adapters_beyond_the_bounds_wait_their_turn_and_lose_no_bit(folders, alone, bounds):
    prompts, params = requests(folders, 10)
    with engine_with(folders, max_loras=bounds[0], max_cpu_loras=bounds[1], max_num_seqs=4) as engine:
        for order in random.Random(sum(filter(None, bounds))).sample(range(10), 10), range(10):
            found = engine.generate([prompts[at] for at in order], [params[at] for at in order])
            assert [*map(outcome, found)] == [outcome(alone[at]) for at in order]
        assert engine.adapters.num_evictions >= 3
        assert sum(one.in_model for one in engine.adapters._loaded.values()) <= bounds[0]
        held = [one for one in engine.adapters._loaded.values() if not one.dropped]
        assert bounds[1] is None or len(held) <= bounds[1]
        engine.check_integrity()


def test_what_drafts_and_grammars_do_with_adapters_changes_no_bit(folders, alone):
    prompts, params = requests(folders, 10)
    with engine_with(
        folders, speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    ) as engine:
        assert [*map(outcome, engine.generate(prompts, params))] == [*map(outcome, alone)]


def test_a_write_to_an_adapter_drops_its_own_pages_alone(folders):
    long = [prompt(1, 64)] * 3
    params = [SamplingParams(max_tokens=1, seed=0, lora_name=name) for name in (None, "narrow", "dora")]
    with engine_with(folders) as engine:
        for one, chosen in zip(long, params):
            engine.generate([one], chosen)
        hits, versions = [], []
        wrapper = engine.backend.model.model.layers[0].self_attn.q_proj
        for write in (None, "narrow", "wide"):
            if write is not None:
                with torch.no_grad():
                    wrapper.lora_B[write].weight.mul_(1.5)
            for one, chosen in zip(long, params):
                before = engine.stats()["prefix_cache_hits"]
                versions.append(engine.generate([one], chosen)[0].weight_version)
                hits.append(engine.stats()["prefix_cache_hits"] > before)
        assert hits == [True, True, True, True, False, True, True, True, True]
        assert versions[0::3] == [versions[0]] * 3
        assert versions[2::3] == [versions[2]] * 3
        assert versions[1] != versions[4] == versions[7]


def test_an_adapter_of_the_model_that_is_active_is_the_same_chosen_or_not(folders):
    import peft

    model = peft.PeftModel.from_pretrained(random_model(DENSE), str(folders["dora"]), "own")
    with Engine(model) as engine:
        engine.load_adapter("narrow", folders["narrow"])
        prompts = [prompt(at, 40) for at in range(3)]
        plain = SamplingParams(max_tokens=5, temperature=0)
        active = engine.generate(prompts, plain)
        hits = engine.stats()["prefix_cache_hits"]
        mixed = engine.generate(
            [*prompts, prompts[0]],
            [SamplingParams(max_tokens=5, temperature=0, lora_name=name) for name in ("own", None, "own", "narrow")],
        )
        assert engine.stats()["prefix_cache_hits"] > hits  # the state is shared: the weights are the same
        assert [*map(outcome, mixed[:3])] == [*map(outcome, active)]
        assert outcome(mixed[3]) != outcome(active[0])
        assert [one.weight_version for one in mixed[:3]] == [one.weight_version for one in active]


def test_an_adapter_is_replaced_and_unloaded_under_way(folders, tmp_path):
    other = save_adapter(random_model(DENSE), tmp_path / "other", seed=77, rank=6)
    params = SamplingParams(max_tokens=12, seed=1, lora_name="narrow")
    with engine_with(folders) as engine:
        first = engine.submit(prompt(0), params)
        engine.step()
        engine.load_adapter("narrow", other, load_inplace=True)
        second = engine.submit(prompt(2), params)
        engine.unload_adapter("narrow")
        with pytest.raises(ToolkitError, match="lora_name must be"):
            engine.submit(prompt(3), params)
        assert "narrow" not in engine.adapters.names
        done = {}
        while engine.has_work:
            done |= {delta.request_id: delta.finished for delta in engine.step() if delta.finished}
        assert [len(done[one].token_ids) for one in (first, second)] == [12, 12]
        assert len(set(done[first].weight_versions)) == 2
        assert engine.adapters.table == ("dora", "whole", "wide")
        engine.load_adapter("narrow", folders["narrow"])
        again = engine.generate([prompt(2)], params)[0]
    with engine_with({"narrow": other}) as engine:
        assert outcome(engine.generate([prompt(2)], params)[0]) == outcome(done[second]) != outcome(again)


def test_the_model_is_as_before_when_the_last_adapter_is_unloaded(folders):
    model = random_model(DENSE)
    names = [name for name, _ in model.named_parameters()]
    needed = [parameter.requires_grad for parameter in model.parameters()]
    with Engine(model) as engine:
        version = engine.generate([prompt(0)], SamplingParams(max_tokens=2))[0].weight_version
        for name, folder in folders.items():
            engine.load_adapter(name, folder)
        assert [parameter.requires_grad for parameter in model.parameters() if parameter.requires_grad] == [
            one for one in needed if one
        ]
        for name in folders:
            engine.unload_adapter(name)
        assert [name for name, _ in model.named_parameters()] == names
        assert engine.generate([prompt(0)], SamplingParams(max_tokens=2))[0].weight_version == version


def test_what_cannot_be_loaded_or_chosen_is_one_sentence_and_changes_nothing(folders, tmp_path):
    model = random_model(DENSE)
    bias = save_adapter(model, tmp_path / "bias", bias="lora_only")
    saved = save_adapter(model, tmp_path / "saved", modules_to_save=["lm_head"])
    biased = save_adapter(model, tmp_path / "biased", lora_bias=True)
    of_other = save_adapter(model, tmp_path / "other")
    tensors = load_file(of_other / WEIGHTS)
    save_file({name.replace("q_proj", "p_proj"): one for name, one in tensors.items()}, of_other / WEIGHTS)
    resized = save_adapter(model, tmp_path / "resized", target_modules=["embed_tokens"])
    tensors = load_file(resized / WEIGHTS)
    base = next(name for name in tensors if "lora_" not in name)
    save_file({**tensors, base: tensors[base] + 1}, resized / WEIGHTS)
    with engine_with({"narrow": folders["narrow"]}) as engine:
        before = [name for name, _ in engine.backend.model.named_parameters()]
        for name, folder, message in (
            ("narrow", folders["dora"], "lora_name must be a name that no adapter has, got 'narrow'."),
            ("", folders["dora"], "lora_name must be text that is not empty"),
            ("x", tmp_path / "none", "must be a folder with adapter_config.json, got none"),
            ("x", bias, "must have bias none"),
            ("x", saved, "must have modules_to_save None"),
            ("x", biased, "must be LoRA or DoRA that rows can choose"),
            ("x", of_other, "must be LoRA of this model"),
            ("x", resized, "must have the model's own weights beside it"),
        ):
            with pytest.raises(ToolkitError, match="^(?!.*\n).*" + message.replace(".", r"\.")):
                engine.load_adapter(name, folder)
            assert [name for name, _ in engine.backend.model.named_parameters()] == before, folder
        with pytest.raises(ToolkitError, match="lora_name must be one of narrow"):
            engine.generate([prompt(0)], SamplingParams(lora_name="narow"))
        with pytest.raises(ToolkitError, match="lora_name must be one of narrow"):
            engine.unload_adapter("x")
        engine.load_adapter("v1.2/x%", folders["dora"])  # names have dots
        engine.generate([prompt(0)], SamplingParams(lora_name="v1.2/x%"))
    with Engine(random_model(DENSE)) as engine, pytest.raises(ToolkitError, match="for a model without adapters"):
        engine.generate([prompt(0)], SamplingParams(lora_name="x"))


@pytest.mark.parametrize("seed", range(2))
def test_random_comings_and_goings(folders, alone, tmp_path, seed):
    """Of each request the adapter is known by the tokens alone: names are given to any folder, again and again."""
    chance = random.Random(seed)
    broken = save_adapter(random_model(DENSE), tmp_path / "broken", lora_bias=True)
    greedy = SamplingParams(max_tokens=6, temperature=0)
    with engine_with(folders) as engine:
        expected = {
            name: engine.generate([prompt(1)], dataclasses.replace(greedy, lora_name=name))[0].token_ids
            for name in (None, *folders)
        }
    with engine_with({}, max_loras=chance.choice((1, 2)), max_cpu_loras=chance.choice((2, 3, None))) as engine:
        known, asked = {}, {}
        for _ in range(60):
            what = chance.random()
            name = f"n{chance.randrange(4)}"
            kind = chance.choice(list(folders))
            if what < 0.2 and name not in known and name not in engine.adapters._leaving:
                engine.load_adapter(name, folders[kind])
                known[name] = kind
            elif what < 0.3 and known:
                name = chance.choice(list(known))
                if not any(one == name for one, _ in asked.values()):  # those would be of both
                    engine.load_adapter(name, folders[kind], load_inplace=True)
                    known[name] = kind
            elif what < 0.4 and known:
                name = chance.choice(list(known))
                engine.unload_adapter(name)
                del known[name]
            elif what < 0.5:
                with pytest.raises(ToolkitError):
                    engine.load_adapter("x", broken)
            elif what < 0.8:
                chosen = chance.choice([None, *known])
                request = engine.submit(prompt(1), dataclasses.replace(greedy, lora_name=chosen))
                asked[request] = chosen, expected[known.get(chosen)]
            for delta in engine.step() if what > 0.5 else ():
                if delta.finished is not None:
                    assert delta.finished.token_ids == asked.pop(delta.request_id)[1]
        while engine.has_work:
            for delta in engine.step():
                if delta.finished is not None:
                    assert delta.finished.token_ids == asked.pop(delta.request_id)[1]
        assert not asked
        assert engine.adapters.num_evictions > 0
        engine.check_integrity()


def test_an_adapter_that_cannot_be_read_again_ends_its_requests_alone(folders, tmp_path):
    removed = save_adapter(random_model(DENSE), tmp_path / "removed", seed=5)
    with engine_with({"removed": removed, **folders}, max_loras=1, max_cpu_loras=1) as engine:
        (removed / WEIGHTS).unlink()
        params = [SamplingParams(max_tokens=3, seed=0, lora_name=name) for name in ("wide", "removed", None)]
        found = engine.generate([prompt(0), prompt(1), prompt(2)], params)
        assert [one.finish_reason for one in found] == ["length", "error", "length"]
        assert WEIGHTS in found[1].error


@pytest.mark.parametrize("family", [MOE, HYBRID])
def test_families_with_experts_and_recurrent_state(family, tmp_path):
    model = random_model(family)
    has_experts = any(name.endswith(EXPERTS[0]) for name, _ in model.named_parameters())
    options = [
        {"rank": 3, "target_modules": ["q_proj"], **({"target_parameters": list(EXPERTS)} if has_experts else {})},
        {"rank": 5, "target_modules": ["q_proj", "o_proj", "lm_head"]},
    ]
    folders = {f"a{at}": save_adapter(model, tmp_path / f"a{at}", at, **one) for at, one in enumerate(options)}
    prompts, params = requests(folders, 6)
    with Engine(copy.deepcopy(model)) as engine:
        plain = engine.generate(prompts[0::3], params[0::3])
        for name, folder in folders.items():
            engine.load_adapter(name, folder)
        together = engine.generate(prompts, params)
        assert [*map(outcome, together[0::3])] == [*map(outcome, plain)]
        lengths = [len(one.token_ids) for one in together]
        sequences = [one.prompt_token_ids + one.token_ids for one in together]
        names = [one.lora_name for one in params]
        trained = token_logprobs(engine.backend.model, sequences, last=lengths, adapters=names)
        for found, one in zip(trained, together):
            assert torch.equal(found.detach(), torch.tensor(one.logprobs))
    for at, name in enumerate((None, *folders)):
        for mine in (at, at + 3):
            (expected,) = oracle_logprobs(model, folders.get(name), [sequences[mine]])
            got = torch.tensor(together[mine].logprobs).double()
            torch.testing.assert_close(got, expected[-len(got) :], rtol=5e-6, atol=2e-5)


@pytest.mark.parametrize("family", [DENSE, MOE])
def test_an_adapters_gradients_do_not_depend_on_its_neighbours(family, tmp_path):
    import peft

    model = random_model(family)
    extra = {"target_parameters": list(EXPERTS)} if family == MOE else {"use_dora": True}
    folders = [
        save_adapter(model, tmp_path / "a0", 0, rank=4, target_modules=["q_proj", "v_proj"]),
        save_adapter(model, tmp_path / "a1", 1, rank=9, target_modules=["q_proj", "o_proj"], **extra),
        save_adapter(model, tmp_path / "a2", 2, rank=2, target_modules=["k_proj"]),
    ]
    adapted = peft.PeftModel.from_pretrained(model, str(folders[0]), "a0", is_trainable=True)
    for at in (1, 2):
        adapted.load_adapter(str(folders[at]), f"a{at}", is_trainable=True)
    toolkit.patch(adapted)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    sequences = [prompt(at, 11 + at) for at in range(6)]
    names = ["a0", "a1", None, "a2", "a1", "a0"]

    def gradients(kept):
        adapted.zero_grad(set_to_none=True)
        chosen = [at for at, name in enumerate(names) if name in kept]
        found = token_logprobs(adapted, [sequences[at] for at in chosen], adapters=[names[at] for at in chosen])
        torch.cat(found).sum().backward()
        return {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.grad is not None}

    together = gradients({"a0", "a1", "a2", None})
    for name in ("a0", "a1", "a2"):  # a0 is active, and acts where none is chosen
        kept = {name, None} if name == "a0" else {name}
        mine = {key: value for key, value in gradients(kept).items() if f".{name}." in key}
        assert mine
        for key, value in mine.items():
            assert torch.equal(value, together[key]), key
            assert value.abs().max() > 0, key
    adapted.train()
    adapted.enable_input_require_grads()  # without them the reentrant variant has no backward
    runs = []
    next(part for name, part in adapted.named_modules() if name.endswith("q_proj")).register_forward_hook(
        lambda *_: runs.append(1)
    )
    for reentrant in (False, True):
        adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
        recomputed = gradients({"a0", "a1", "a2", None})
        assert len(runs) == 2, "the backward did not run the layer again"
        runs.clear()
        assert recomputed.keys() == together.keys()
        assert all(torch.equal(value, together[key]) for key, value in recomputed.items()), reentrant
