"""An engine that offloads cached prefixes returns what one without them returns, bit by bit."""

import random
from collections import Counter

import pytest
import torch

import toolkit
from tests.helpers.adapter_folders import save_adapter
from tests.helpers.engine_standin import HistoryModel, logits_of, make_request
from toolkit.engine import Engine, SamplingParams
from toolkit.engine.sampler import Sampler
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model

FAMILIES = ["llama", "gemma2", "deepseek_v3", "qwen3_next", "mamba2", "lfm2"]
VOCABULARY = 97
GIB = 1 << 30


def params(**given):
    return SamplingParams(**({"max_tokens": 6, "temperature": 1.0, "seed": 3, "ignore_eos": True} | given))


def shared_prompts(chance, count, prefixes=8):
    shared = [[chance.randrange(VOCABULARY) for _ in range(chance.choice((21, 40)))] for _ in range(prefixes)]
    return [
        chance.choice(shared)[: chance.choice((12, 21, 40))]
        + [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 5))]
        for _ in range(count)
    ]


def assert_same_bits(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(torch.tensor(one.token_ids), torch.tensor(other.token_ids))
        logprobs = (torch.tensor(which.logprobs, dtype=torch.float64) for which in (one, other))
        assert torch.equal(*logprobs)


def settings_of(name, folder, block_bytes):
    return {
        "host": {"kv_host_space": None},
        "disk": {"kv_disk_space": None, "kv_disk_folder": str(folder)},
        "both": {
            "kv_host_space": 40 * block_bytes / GIB, "kv_disk_space": 60 * (block_bytes + 700) / GIB,
            "kv_disk_folder": str(folder),
        },
    }[name]  # fmt: skip


@pytest.mark.parametrize("where", ["host", "disk", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_state_that_comes_back_is_the_state_that_went(family, where, tmp_path):
    model = random_model(family, layers=2, vocabulary=VOCABULARY)
    toolkit.patch(model)
    prompts = shared_prompts(random.Random(0), 40)
    with Engine(model, enable_prefix_caching=False, block_size=4) as engine:
        expected = engine.generate(prompts, params())
        largest = max(engine.pool.group_bytes)
    given = settings_of(where, tmp_path, largest)
    with Engine(model, block_size=4, num_blocks=24, max_num_seqs=2, **given) as engine:
        for _ in range(2):
            assert_same_bits(engine.generate(prompts, params()), expected)
            engine.check_integrity()
        stats = engine.stats()
        assert stats["kv_restored_tokens"] > 100
        assert stats["prefix_cache_hits"] >= stats["kv_restored_tokens"]
        if where != "disk":
            assert stats["kv_host_hits"] > 10
            assert stats["kv_host_bytes"] > 0
        if where != "host":
            assert stats["kv_disk_hits"] > 10
            assert stats["kv_disk_failures"] == 0
            assert sum(path.suffix == ".safetensors" for path in tmp_path.rglob("*")) == stats["kv_disk_blocks"]
        if where == "both":
            assert stats["kv_host_evictions"] > 0
            assert stats["kv_disk_evictions"] > 0
    assert list(tmp_path.iterdir()) == []  # closed


def test_recorded_experts_come_back_with_the_rest():
    """State that is recorded for training is state, too."""
    model = random_model("qwen3_moe", layers=2, vocabulary=VOCABULARY)
    prompts = shared_prompts(random.Random(1), 24)
    with Engine(model, enable_prefix_caching=False, block_size=4, enable_return_routed_experts=True) as engine:
        expected = engine.generate(prompts, params())
    with Engine(
        model, block_size=4, num_blocks=24, max_num_seqs=2, kv_host_space=1, enable_return_routed_experts=True
    ) as engine:
        for _ in range(2):
            found = engine.generate(prompts, params())
            assert_same_bits(found, expected)
            assert all(one.routed_experts.equal(other.routed_experts) for one, other in zip(found, expected))
        assert engine.stats()["kv_host_hits"] > 10


def test_a_weight_change_outdates_what_is_offloaded(tmp_path):
    model = random_model("llama", layers=2, vocabulary=VOCABULARY)
    prompts = shared_prompts(random.Random(2), 20)
    given = {"kv_host_space": 10 * 2048 / GIB, "kv_disk_space": None, "kv_disk_folder": str(tmp_path)}
    with Engine(model, block_size=4, num_blocks=24, max_num_seqs=2, **given) as engine:
        engine.generate(prompts, params())
        assert engine.stats()["kv_host_blocks"] > 0
        assert engine.stats()["kv_disk_blocks"] > 0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.02)
        with Engine(model, enable_prefix_caching=False, block_size=4) as other:
            expected = other.generate(prompts, params())
        before = engine.stats()["kv_restored_tokens"]
        assert_same_bits(engine.generate(prompts[:1], params()), expected[:1])
        stats = engine.stats()
        assert stats["kv_restored_tokens"] == before
        assert stats["kv_host_blocks"] == stats["kv_disk_blocks"] == 0
        engine.check_integrity()
        assert_same_bits(engine.generate(prompts, params()), expected)


def test_adapters_have_offloaded_prefixes_of_their_own():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(random_model("llama", layers=2, vocabulary=VOCABULARY), config)
    prompts = shared_prompts(random.Random(3), 16)

    def expected():
        with Engine(model, enable_prefix_caching=False, block_size=4) as engine:
            return engine.generate(prompts, params())

    adapted = expected()
    with model.disable_adapter():
        plain = expected()
    with Engine(model, block_size=4, num_blocks=24, max_num_seqs=2, kv_host_space=1) as engine:
        for _ in range(2):
            assert_same_bits(engine.generate(prompts, params()), adapted)
            with model.disable_adapter():
                assert_same_bits(engine.generate(prompts, params()), plain)
            engine.check_integrity()
        assert engine.stats()["kv_host_hits"] > 20


def test_a_reset_forgets_what_is_offloaded(tmp_path):
    model = random_model("llama", layers=2, vocabulary=VOCABULARY)
    prompts = shared_prompts(random.Random(6), 12)
    given = {"kv_host_space": 10 * 2048 / GIB, "kv_disk_space": None, "kv_disk_folder": str(tmp_path)}
    with Engine(model, block_size=4, num_blocks=24, max_num_seqs=2, **given) as engine:
        engine.generate(prompts, params())
        assert min(engine.stats()[f"kv_{where}_blocks"] for where in ("host", "disk")) > 0
        engine.reset_prefix_cache()
        stats = engine.stats()
        assert max(stats[name] for name in stats if name.endswith(("_bytes", "cached_blocks", "used_blocks"))) == 0
        engine.check_integrity()
        hits = stats["prefix_cache_hits"]
        engine.generate(prompts[0], params())
        assert engine.stats()["prefix_cache_hits"] == hits


def test_rows_that_choose_adapters_get_their_prefixes_back(tmp_path):
    pytest.importorskip("peft")
    model = random_model("llama", layers=2, vocabulary=VOCABULARY)
    names = [save_adapter(model, tmp_path / name, seed).name for seed, name in enumerate(("one", "two"))]
    prompts = shared_prompts(random.Random(8), 30, prefixes=4)
    asked = [params(lora_name=(None, *names)[at % 3]) for at in range(30)]

    def engine_of(**given):
        engine = Engine(random_model("llama", layers=2, vocabulary=VOCABULARY), block_size=4, **given)
        for name in names:
            engine.load_adapter(name, tmp_path / name)
        return engine

    with engine_of(enable_prefix_caching=False) as engine:
        expected = engine.generate(prompts, asked)
    with engine_of(num_blocks=24, max_num_seqs=2, kv_host_space=1) as engine:
        for _ in range(2):
            assert_same_bits(engine.generate(prompts, asked), expected)
            engine.check_integrity()
        assert engine.stats()["kv_host_hits"] > 20
        saved = engine.save_prefixes(tmp_path / "saved")
    with engine_of(num_blocks=24, max_num_seqs=2, kv_host_space=1) as engine:
        loaded = engine.load_prefixes(tmp_path / "saved")
        assert (loaded.num_blocks, loaded.num_skipped) == (saved.num_blocks, 0)
        assert_same_bits(engine.generate(prompts, asked), expected)
        assert engine.stats()["kv_host_hits"] > 20


def test_offloaded_prefixes_stay_while_the_engine_sleeps():
    model = random_model("qwen3_next", layers=2, vocabulary=VOCABULARY)
    prompts = shared_prompts(random.Random(4), 24)
    with Engine(model, block_size=4, num_blocks=24, max_num_seqs=2, kv_host_space=1) as engine:
        expected = engine.generate(prompts, params())
        engine.submit_batch(prompts[:3], params())
        engine.step()
        blocks = engine.stats()["kv_host_blocks"]
        engine.sleep()
        engine.check_integrity()
        assert engine.stats()["num_cached_blocks"] == 0
        assert engine.stats()["kv_host_blocks"] == blocks > 0
        engine.wake()
        hits = engine.stats()["kv_host_hits"]
        assert_same_bits(engine.generate(prompts, params()), expected)
        assert engine.stats()["kv_host_hits"] > hits
        engine.check_integrity()
    assert engine.stats()["kv_host_blocks"] == 0


def test_a_damaged_file_is_computed_again(tmp_path):
    model = random_model("llama", layers=2, vocabulary=VOCABULARY)
    prompts = shared_prompts(random.Random(5), 24)
    given = {"kv_disk_space": None, "kv_disk_folder": str(tmp_path)}
    with Engine(model, block_size=4, num_blocks=24, max_num_seqs=2, **given) as engine:
        expected = engine.generate(prompts, params())
        files = sorted(tmp_path.rglob("*.safetensors"))
        for at, path in enumerate(files):
            content = bytearray(path.read_bytes())
            content[-1 - at % 900] ^= 4
            if at % 3:
                path.write_bytes(content if at % 3 == 1 else content[:50])
        assert_same_bits(engine.generate(prompts, params()), expected)
        stats = engine.stats()
        assert stats["kv_disk_failures"] > 5
        assert stats["kv_disk_hits"] > 5
        engine.check_integrity()


def check_history(completion, prompt, asked):
    """Every token is the sample behind those before it, under the weights that it says."""
    (sequence,) = make_request(prompt, asked).sequences
    for token, logprob, version in zip(completion.token_ids, completion.logprobs, completion.weight_versions):
        sampled = Sampler().sample(logits_of(tuple(sequence.tokens), version)[None], [sequence])
        assert (sampled.token_ids[0], sampled.logprobs[0]) == (token, logprob)
        sequence.tokens.append(token)


def random_schedule(seed, folder, requests):
    """A schedule of submits, cancels, weight changes, sleeps and preemptions over a tiny pool with offloading."""
    chance, happened = random.Random(seed), Counter()
    model = HistoryModel()
    block_bytes = 4 * 2 * 2 * 4
    engine = Engine(
        model, block_size=4, num_blocks=chance.choice((16, 20, 40)), max_num_seqs=chance.choice((1, 3, 6)),
        max_num_batched_tokens=chance.choice((6, 16, 64)), swap_space=chance.choice((0, None)),
        kv_host_space=chance.choice((0, 10 * block_bytes / GIB, 60 * block_bytes / GIB, None)),
        kv_disk_space=30 * 700 / GIB, kv_disk_folder=str(folder),
    )  # fmt: skip
    shared = [[chance.randrange(1, 60) for _ in range(24)] for _ in range(6)]
    asked, left = {}, requests
    while left or engine.has_work:
        if left and chance.random() < 0.4:
            prompt = [*chance.choice(shared)[: chance.randint(1, 24)], chance.randrange(1, 60)]
            one = params(max_tokens=chance.randint(1, 9), seed=left, cache_salt=chance.choice((None, None, "salt")))
            asked[engine.submit(prompt, one)] = prompt, one, model.weights
            left -= 1
        if chance.random() < 0.02 and engine.requests.by_id:
            engine.cancel(chance.choice(list(engine.requests.by_id)))
            happened["cancelled"] += 1
        if chance.random() < 0.01:
            model.weights += 1
            happened["weights"] += 1
        if chance.random() < 0.005:
            engine.sleep()
            engine.wake()
            happened["slept"] += 1
        if chance.random() < 0.03 and engine.scheduler.running:
            engine.scheduler.preempt(chance.choice(engine.scheduler.running))
        model.versions_read.clear()
        same = all(weights == model.weights for _, _, weights in asked.values())
        deltas = engine.step()
        if same:  # else some sequences have seen several
            assert all(read == {model.weights} for read in model.versions_read)
        for delta in deltas:
            if delta.finished is not None:
                prompt, one, _ = asked.pop(delta.request_id)
                assert delta.finished.finish_reason in ("length", "cancelled")
                check_history(delta.finished, prompt, one)
        engine.check_integrity()
    stats = engine.stats()
    assert not asked
    assert stats["num_used_blocks"] == 0
    happened.update({name: stats[name] for name in stats if name.endswith(("_hits", "_evictions", "_preemptions"))})
    engine.close()
    assert list(folder.iterdir()) == []
    return happened


def check_schedules(seeds, folder, requests):
    happened = Counter()
    for seed in seeds:
        happened.update(random_schedule(seed, folder, requests))
    for name in ("cancelled", "weights", "slept", "kv_host_hits", "kv_disk_hits", "num_preemptions"):
        assert happened[name] > 5, happened
    for name in ("kv_host_evictions", "kv_disk_evictions"):
        assert happened[name] > 20, happened


def test_random_schedules_lose_no_block_and_no_bit(tmp_path):
    check_schedules(range(8), tmp_path, 40)


@pytest.mark.sweep
def test_many_random_schedules_lose_no_block_and_no_bit(tmp_path):
    check_schedules(range(100, 125), tmp_path, 80)


@pytest.mark.sweep
@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "bamba", "granite_swa"])
def test_models_that_offload_follow_those_without_in_random_schedules(family, tmp_path):
    chance = random.Random(len(family))
    model = random_model(family, layers=2, vocabulary=VOCABULARY)
    prompts = shared_prompts(chance, 40, prefixes=10)
    asked = [params(max_tokens=chance.randint(1, 9), seed=at, n=chance.choice((1, 2))) for at in range(40)]
    settings = {
        "block_size": 4, "num_blocks": chance.choice((24, 30)), "max_num_batched_tokens": chance.choice((9, 64)),
        "max_num_seqs": chance.choice((2, 4)), "swap_space": chance.choice((0, None)),
        "speculative_config": chance.choice((None, {"adaptive": False, "prompt_lookup_min": 1})),
    }  # fmt: skip
    engine = Engine(model, **settings, kv_host_space=2e-5, kv_disk_space=1e-4, kv_disk_folder=str(tmp_path / family))
    for _ in range(2):
        with Engine(model, block_size=4, enable_prefix_caching=False) as plain:
            expected = plain.generate(prompts, asked)
        for _ in range(2):
            assert_same_bits(engine.generate(prompts, asked), expected)
            engine.check_integrity()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    assert engine.stats()["kv_restored_tokens"] > 50
    engine.close()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_host_space": -1}, "kv_host_space must be a finite number >= 0, got -1"),
        ({"kv_disk_space": 1}, "kv_disk_folder must be the path of a folder with kv_disk_space, got None"),
        ({"kv_disk_folder": "x"}, "kv_disk_folder must be None without kv_disk_space, got 'x'"),
        ({"kv_disk_space": 1, "kv_disk_folder": 3}, "kv_disk_folder must be the path of a folder or None, got 3"),
        ({"kv_host_space": 1, "enable_prefix_caching": False}, "kv_host_space must be 0 without enable_prefix_caching"),
        ({"kv_disk_space": 1, "kv_disk_folder": "/dev/null/x"}, "kv_disk_folder must be a folder that can be written"),
    ],
)
def test_what_cannot_be_kept_is_one_sentence(given, message):
    with pytest.raises(ToolkitError, match=message):
        Engine(HistoryModel(), **given)
