"""The contract of exports: written as a whole or not at all, failures are sentences, a manifest says what happened."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tests.helpers.exported_models import exported_model
from tests.helpers.tokenizers import make_tokenizer
from toolkit.errors import ToolkitError
from toolkit.exporting import MANIFEST, TARGETS, ExportTarget, export
from toolkit.exporting.folders import new_folder
from toolkit.testing.models import random_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model():
    return random_model("llama", hidden=16, layers=1, vocabulary=340)


def test_the_manifest_has_source_hashes_versions_and_what_the_consumer_generated(model, tmp_path):
    prompts = [[5, 6, 7], [9, 3]]
    path = export(model, tmp_path / "out", tokenizer=make_tokenizer(), prompts=prompts, max_tokens=5)
    manifest = json.loads((path / MANIFEST).read_text())
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {MANIFEST}
    for name, file in manifest["files"].items():
        content = (path / name).read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    proof = manifest["proof"]
    assert proof["prompts"] == prompts
    assert proof["consumer"].startswith("transformers ")
    expected = [
        model.generate(torch.tensor([one]), do_sample=False, max_new_tokens=5, min_new_tokens=5, pad_token_id=0)
        for one in prompts
    ]
    assert proof["outputs"] == [out[0, len(one) :].tolist() for out, one in zip(expected, prompts)]
    assert manifest["versions"]["torch"] == torch.__version__
    assert (manifest["format"], manifest["quantise"], manifest["weight_version"]) == ("hf", None, None)


def test_every_token_that_ends_a_text_is_in_the_generation_config(model, tmp_path):
    tokenizer = make_tokenizer(eos_token="<|im_end|>")
    model.generation_config.eos_token_id = 2
    export(model, tmp_path / "out", tokenizer=tokenizer)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [2, tokenizer.eos_token_id]
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    ("family", "settings", "older"),
    [
        ("llama", {}, {"rope_theta": 77777.0}),
        ("llama", {"rope_type": "linear", "factor": 4.0}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("qwen3_next", {"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.5}),
    ],
)
def test_rotary_settings_have_their_older_names_too(tmp_path, family, settings, older):
    rotary = {"rope_type": "default", "rope_theta": 77777.0, **settings}
    model = random_model(family, rope_parameters=rotary)
    export(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.items() >= {"rope_theta": 77777.0, **older}.items()
    again = AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    assert again["rope_parameters"] == model.config.to_dict()["rope_parameters"]
    assert not {"rope_theta", "rope_scaling"} & again.keys()


@pytest.mark.parametrize(
    ("family", "older"),
    [
        ("qwen3_moe", {"num_experts": 12, "rope_theta": 10000.0, "max_window_layers": 2}),
        ("lfm2", {"block_dim": 64, "conv_dim": 64}),
        ("gemma3_text", {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "sliding_window_pattern": 3}),
    ],
)
def test_fields_have_their_older_names_too(tmp_path, family, older):
    if family == "gemma3_text":
        rotary = {"sliding_attention": {"rope_theta": 2e4}, "full_attention": {"rope_theta": 5e5}}
        model, _ = exported_model(family, rope_parameters=rotary)
    else:
        model = random_model(family)
    export(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()).items() >= older.items()
    again = AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    before = model.config.to_dict()
    changed = {name for name in before if again[name] != before[name] and not name.startswith("_")}
    assert changed <= {"architectures"}
    assert again.keys() - before.keys() <= {"block_dim", "conv_dim", "max_window_layers", "sliding_window_pattern"}


def test_weights_are_sharded(model, tmp_path, monkeypatch):
    monkeypatch.setattr("toolkit.exporting.hf.SHARD", "10KB")
    path = export(model, tmp_path / "out", prompts=[[3, 4]], max_tokens=3)
    assert len(list(path.glob("*.safetensors"))) > 1
    assert json.loads((path / MANIFEST).read_text())["proof"]["outputs"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"to": "hff"}, "to must be one of .*hf.*, got 'hff'; did you mean 'hf'?"),
        ({"quantise": "q8_0"}, "quantise must not be given for 'hf'"),
    ],
)
def test_what_a_target_does_not_know_is_a_sentence(model, tmp_path, options, sentence):
    with pytest.raises(ToolkitError, match=sentence):
        export(model, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_as_it_is(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(ToolkitError, match="path must be a new or empty folder"):
        export(model, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_adapters_beside_the_weights_are_refused_by_name(tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(random_model("llama", hidden=16, layers=1), peft.LoraConfig(r=2))
    with pytest.raises(ToolkitError, match="model has the adapters default beside them"):
        export(adapted, tmp_path / "out")
    assert not list(tmp_path.iterdir())


FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device"), "The disk is full: the export to .* GB that are free"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "The disk is full"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "The disk is full"),  # safetensors' own
    (PermissionError(errno.EACCES, "Permission denied"), "path must be in a folder that may be written"),
    (OSError(errno.EROFS, "Read-only file system"), "path must be in a folder that may be written"),
]


@pytest.mark.parametrize(("error", "sentence"), FAILURES)
def test_errors_of_the_file_system_are_sentences_and_leave_nothing(tmp_path, error, sentence):
    def write_half():
        with new_folder(tmp_path / "a" / "b" / "out") as folder:
            (folder / "half.bin").write_bytes(b"1")
            raise error

    with pytest.raises(ToolkitError, match=sentence):
        write_half()
    assert not list(tmp_path.iterdir())


def test_a_file_above_the_folder_is_a_sentence(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolkitError, match="path must be in a folder, got"):
        export(model, tmp_path / "file" / "out")


def test_what_a_killed_export_left_is_removed_by_the_next(model, tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead = tmp_path / f".out.{ended.stdout.strip()}.partial"
    alive, foreign = tmp_path / f".out.{os.getppid()}.partial", tmp_path / ".other.1.partial"
    for folder in (dead, alive, foreign):
        folder.mkdir()
    export(model, tmp_path / "out")
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted([alive.name, foreign.name, "out"])


SLOW = """
import sys, time
import toolkit.cli
from toolkit.exporting import ExportTarget
class Slow(ExportTarget, name="slow"):
    def write(self, job, folder):
        (folder / "half.bin").write_bytes(b"1")
        print("half", flush=True)
        time.sleep(60)
sys.exit(toolkit.cli.main(["export", sys.argv[1], sys.argv[2], "--to", "slow"]))
"""


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.sweep) for one in (signal.SIGINT, signal.SIGHUP))]
)
def test_an_interrupted_export_leaves_nothing(model, tmp_path, number):
    saved = export(model, tmp_path / "saved", tokenizer=make_tokenizer())
    out = tmp_path / "new" / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(saved), str(out)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    begun = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=30) in (128 + number, 130)
    assert time.monotonic() - begun < 30
    assert [folder.name for folder in tmp_path.iterdir()] == ["saved"]


def test_an_export_that_its_program_does_not_run_is_not_kept(model, tmp_path, monkeypatch):
    from toolkit.exporting.hf import HuggingFace

    def fail(self, folder, prompts, max_tokens):
        raise RuntimeError("no such layer")

    monkeypatch.setattr(HuggingFace, "consume", fail)
    with pytest.raises(
        ToolkitError, match=r"The program of 'hf' does not run the export \(RuntimeError: no such layer"
    ):
        export(model, tmp_path / "out", prompts=[[1, 2]])
    assert not list(tmp_path.iterdir())


class NeedsNothingThere(ExportTarget, name="needs-nothing-there"):
    def packages(self, quantise):
        return ("no_such_package_at_all",)

    def write(self, job, folder):
        raise AssertionError("it must not be called")


def test_a_missing_package_is_one_sentence(model, tmp_path):
    try:
        with pytest.raises(ToolkitError, match=r"needs the package 'no_such_package_at_all': pip install"):
            export(model, tmp_path / "out", "needs-nothing-there")
    finally:
        TARGETS._classes.pop("needs-nothing-there")
    assert not list(tmp_path.iterdir())
