"""Prefixes in files: another process with the same model continues behind them, and no other one does."""

import copy
import json
import random
import subprocess
import sys

import pytest
import torch

import toolkit
from tests.helpers.engine_standin import HistoryModel
from toolkit.engine import Engine, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.patching.weights.fingerprint import model_fingerprint
from toolkit.testing.models import random_model

VOCABULARY = 97
PARAMS = {"max_tokens": 6, "temperature": 1.0, "seed": 3, "ignore_eos": True}
ENGINE = {"block_size": 4, "num_blocks": 30, "max_num_seqs": 2}


def model_of(family="llama"):
    model = random_model(family, layers=2, vocabulary=VOCABULARY)
    toolkit.patch(model)
    return model


def prompts_of(count=10):
    chance = random.Random(7)
    return [[chance.randrange(VOCABULARY) for _ in range(25)] for _ in range(count)]


def outcome(completions):
    return [[one.token_ids, [value.hex() for value in one.logprobs]] for one in completions]


def save(model, folder, prompts=None, **given):
    with Engine(model, **ENGINE, **given) as engine:
        expected = outcome(engine.generate(prompts or prompts_of(), SamplingParams(**PARAMS)))
        return expected, engine.save_prefixes(folder)


PROGRAM = """
import json, sys
import toolkit
from tests.engine.test_saved_prefixes import ENGINE, PARAMS, model_of, outcome, prompts_of
with toolkit.Engine(model_of(sys.argv[2]), **ENGINE, kv_host_space=1) as engine:
    files = engine.load_prefixes(sys.argv[1])
    found = outcome(engine.generate(prompts_of(), toolkit.SamplingParams(**PARAMS)))
    engine.check_integrity()
    print(json.dumps([found, files.num_blocks, files.num_skipped, engine.stats()["prefix_cache_hits"]]))
"""


@pytest.mark.sweep
@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3", "qwen3_next", "mamba2"])
def test_another_process_continues_where_this_one_was(family, tmp_path):
    expected, files = save(model_of(family), tmp_path, kv_host_space=1)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), family]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found, num_blocks, num_skipped, hits = json.loads(done.stdout)
    assert found == expected
    assert (num_blocks, num_skipped) == (files.num_blocks, 0)
    assert hits == 10 * 24


@pytest.mark.parametrize("offloading", [{}, {"kv_host_space": 1}, {"kv_host_space": 3e-5}])
@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_a_copy_of_the_model_continues_behind_what_was_saved(family, offloading, tmp_path):
    model = model_of(family)
    expected, files = save(model, tmp_path / "saved", **offloading)
    assert files.num_blocks > 20
    assert files.fingerprint_seconds > 0
    again, _ = save(model, tmp_path / "saved", **offloading)  # in the place of the first
    assert again == expected
    folder = str(tmp_path / "disk")
    with Engine(copy.deepcopy(model), **ENGINE, kv_disk_space=None, kv_disk_folder=folder) as engine:
        loaded = engine.load_prefixes(tmp_path / "saved")
        assert (loaded.num_blocks, loaded.num_bytes, loaded.num_skipped) == (files.num_blocks, files.num_bytes, 0)
        engine.check_integrity()
        assert outcome(engine.generate(prompts_of(), SamplingParams(**PARAMS))) == expected
        engine.check_integrity()
        assert engine.stats()["prefix_cache_hits"] == (
            240 if offloading == {"kv_host_space": 1} else engine.stats()["kv_restored_tokens"]
        )
        assert engine.stats()["kv_restored_tokens"] > 0
        assert engine.load_prefixes(tmp_path / "saved").fingerprint_seconds == 0


def test_prefixes_of_a_salt_are_loaded_for_that_salt(tmp_path):
    model, (prompt, *_) = model_of(), prompts_of()
    with Engine(model, **ENGINE) as engine:
        engine.generate(prompt, SamplingParams(**PARAMS, cache_salt="mine"))
        engine.save_prefixes(tmp_path)
    with Engine(model, **ENGINE, kv_host_space=1) as engine:
        engine.load_prefixes(tmp_path)
        for salt, hits in ((None, 0), ("yours", 0), ("mine", 24)):
            (done,) = engine.generate(prompt, SamplingParams(**PARAMS, cache_salt=salt))
            assert done.num_cached_tokens == hits


def test_what_another_model_computed_is_skipped_and_counted(tmp_path):
    model = model_of()
    _, files = save(model, tmp_path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    for changed, given in ((other, {}), (model, {"block_size": 8})):
        with Engine(changed, **{**ENGINE, **given}, kv_host_space=1) as engine:
            loaded = engine.load_prefixes(tmp_path)
            assert (loaded.num_blocks, loaded.num_skipped) == (0, files.num_blocks)
            assert engine.stats()["kv_host_blocks"] == 0
    _, mine = save(other, tmp_path)  # both models may use a folder
    for one, its in ((model, files), (other, mine)):
        with Engine(one, **ENGINE, kv_host_space=1) as engine:
            assert engine.load_prefixes(tmp_path).num_blocks == its.num_blocks


def test_outdated_prefixes_are_not_saved(tmp_path):
    model = model_of()
    with Engine(model, **ENGINE, kv_host_space=1) as engine:
        engine.generate(prompts_of(), SamplingParams(**PARAMS))
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        assert engine.save_prefixes(tmp_path).num_blocks == 0
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_files_are_skipped_and_counted(tmp_path):
    model = model_of()
    expected, files = save(model, tmp_path, kv_host_space=1)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # in one block
    path.write_bytes(content)
    (tmp_path / "cut.safetensors").write_bytes(content[:1000])
    (tmp_path / "text.safetensors").write_text("no tensors")
    with Engine(model, **ENGINE, kv_host_space=1) as engine:
        loaded = engine.load_prefixes(tmp_path)
        assert (loaded.num_blocks, loaded.num_skipped) == (files.num_blocks - 1, 3)
        assert outcome(engine.generate(prompts_of(), SamplingParams(**PARAMS))) == expected


def test_what_cannot_be_saved_or_loaded_is_one_sentence(tmp_path):
    model = model_of()
    with Engine(model) as engine, pytest.raises(ToolkitError, match="kv_host_space must be > 0 or None to load"):
        engine.load_prefixes(tmp_path)
    with Engine(model, kv_host_space=1) as engine:
        with pytest.raises(ToolkitError, match="folder must be one that save_prefixes wrote, got"):
            engine.load_prefixes(tmp_path / "nothing")
        assert engine.load_prefixes(tmp_path).num_blocks == 0
    with pytest.raises(ToolkitError, match="the engine is closed"):
        engine.save_prefixes(tmp_path)
    engine = Engine(HistoryModel(), kv_host_space=1)
    with pytest.raises(ToolkitError, match="model must be a Hugging Face model to save or load prefixes"):
        engine.save_prefixes(tmp_path)


def test_every_weight_and_setting_is_in_the_fingerprint():
    model = model_of("deepseek_v3")
    fingerprint = model_fingerprint(model)
    assert model_fingerprint(copy.deepcopy(model)) == fingerprint
    model.config._name_or_path = model.name_or_path = "/somewhere/else"
    assert model_fingerprint(model) == fingerprint
    seen = {fingerprint}

    def differs():
        found = model_fingerprint(model)
        assert found not in seen
        seen.add(found)

    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            raw = tensor.view(-1).view(torch.uint8)
            raw[len(raw) // 3] ^= 1
            differs()
    model.model.layers[0].self_attn.scaling *= 2
    differs()
    model.config.rms_norm_eps = 1e-3
    differs()
    model.register_buffer("another", torch.zeros(1))
    differs()
