"""Checkpoints: whole or absent, verified, loadable in plain transformers, exact in every part."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.training_recipes import tiny_recipe, write_corpus
from toolkit import files
from toolkit.config.outputs import LogSection
from toolkit.errors import ToolkitError
from toolkit.loading import find_source
from toolkit.loading.run import latest, name_of, step_of, steps_in
from toolkit.training import checkpoint
from toolkit.training.details import FILE as DETAILS
from toolkit.training.details import StepDetails
from toolkit.training.loop import Trainer
from toolkit.training.metrics import Metrics, read_metrics
from toolkit.training.optimizers import make_optimizer
from toolkit.training.state import load_optimizer, restore_rng, rng_state, save_optimizer


def fill(folder: Path, step: int) -> None:
    with checkpoint.writing(folder, step) as staging:
        (staging / "config.json").write_text(f"{{{step}")
        (staging / "training").mkdir()
        (staging / "training" / "state.json").write_text("x" * step)


def test_names() -> None:
    assert name_of(100) == "step-000100"
    assert step_of("step-000100") == 100
    assert step_of("step-1234567") == 1234567
    for name in (".step-000100.new", "step-100", "step-000100.old", "latest", "step-00010x"):
        assert step_of(name) is None


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    fill(tmp_path, 5)

    def fail() -> None:
        with checkpoint.writing(tmp_path, 6) as staging:
            (staging / "model.safetensors").write_bytes(b"half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000005"]
    assert latest(tmp_path) == tmp_path / "step-000005"
    assert checkpoint.verify(tmp_path / "step-000005")["step"] == 5


def test_leftovers_are_neither_taken_nor_kept(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    shutil.copytree(tmp_path / "step-000005", tmp_path / ".step-000006.new")
    shutil.copytree(tmp_path / "step-000005", tmp_path / ".step-000004.old")
    (tmp_path / ".latest.new").write_text("step-000006")
    assert steps_in(tmp_path) == [5]
    checkpoint.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000005"]


def test_prune_latest_and_drop_after(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    for step in (1, 2, 3, 4):
        fill(tmp_path, step)
    checkpoint.prune(tmp_path, 3)
    assert steps_in(tmp_path) == [2, 3, 4]
    assert latest(tmp_path) == tmp_path / "step-000004"
    assert checkpoint.drop_after(tmp_path, 2) == ["step-000003", "step-000004"]
    assert latest(tmp_path) == tmp_path / "step-000002"
    (tmp_path / "latest").unlink()
    assert latest(tmp_path) == tmp_path / "step-000002"
    (tmp_path / "latest").write_text("step-000009\n")
    with pytest.raises(ToolkitError, match=r"names 'step-000009', which is no checkpoint there; there are step-000002"):
        latest(tmp_path)


def test_resolve(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fill(run / "checkpoints", 3)
    fill(run / "checkpoints", 12)
    expected = run / "checkpoints" / "step-000012"
    for path in (run, run / "checkpoints", expected):
        assert find_source(path).folder == expected
    with pytest.raises(ToolkitError, match="must be the folder of a model or of a training run"):
        find_source(tmp_path)


def test_each_corruption_is_one_sentence_naming_the_file(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    fill(tmp_path, 7)
    broken = tmp_path / "step-000007"

    def sentence() -> str:
        with pytest.raises(ToolkitError) as caught:
            checkpoint.verify(broken)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"Checkpoint {broken} is corrupt: ")
        assert message.endswith("; resume from another one with resume_from_checkpoint=step-000005.")
        return message

    state = broken / "training" / "state.json"
    state.write_text("x" * 6)
    assert "training/state.json has 6 bytes where 7 were written" in sentence()
    state.write_text("x" * 6 + "y")
    assert "the content of training/state.json is not what was written" in sentence()
    state.unlink()
    assert "training/state.json is missing" in sentence()
    for content in ("", "[]", "{", '{"files": {"a": 3}}'):
        (broken / "manifest.json").write_text(content)
        assert "manifest.json is not a manifest" in sentence()
    (broken / "manifest.json").unlink()
    assert "manifest.json is missing" in sentence()


def test_write_atomic_keeps_the_old_content_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    files.write_atomic(path, "old")

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_optimizer_state_is_exact(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 1))
        return model, make_optimizer(model, recipe.optimizer)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        model(torch.randn(7, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make()
    for seed in range(3):
        step(model, optimizer, seed)
    optimizer.param_groups[0]["lr"] = 0.1 + 0.2
    groups = save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    other, restored = make()
    other.load_state_dict(model.state_dict())
    load_optimizer(restored, other, tmp_path / "o.safetensors", json.loads(json.dumps(groups)))
    step(model, optimizer, 9)
    step(other, restored, 9)
    for mine, theirs in zip(model.parameters(), other.parameters()):
        assert torch.equal(mine, theirs)
    assert [group["weight_decay"] for group in restored.param_groups] == [0.1, 0.0]
    assert [p.dim() for p in restored.param_groups[1]["params"]] == [1, 1, 1, 1]
    wrong = torch.nn.Linear(3, 5)
    with pytest.raises(ToolkitError, match="optimizer of a model with other parameters"):
        load_optimizer(make_optimizer(wrong, recipe.optimizer), wrong, tmp_path / "o.safetensors", groups)


def test_random_state_is_exact() -> None:
    random.gauss(0, 1)  # leaves a cached second value behind
    np.random.standard_normal()
    values, tensors = rng_state()
    values = json.loads(json.dumps(values))

    def sample() -> list[float]:
        return [
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(),
            np.random.rand(),
            torch.rand(()).item(),
        ]

    first = sample()
    assert sample() != first
    restore_rng(values, tensors)
    assert sample() == first


def test_metrics_drop_what_is_later_and_what_is_cut(tmp_path: Path) -> None:
    details = StepDetails(LogSection(details_steps=1))
    metrics = Metrics(tiny_recipe(tmp_path), tmp_path, 0, details)
    for step in (1, 2, 3):
        details.add_expert_load([torch.full((2,), step)])
        metrics.write({"step": step, "loss": 1 / 3})
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    again = Metrics(tiny_recipe(tmp_path), tmp_path, 2, StepDetails(LogSection()))
    again.write({"step": 3, "loss": 5.0})
    again.close()
    assert [line["loss"] for line in read_metrics(path)] == [1 / 3, 1 / 3, 5.0]
    assert [line["expert_load"] for line in read_metrics(tmp_path / DETAILS)] == [[[1, 1]], [[2, 2]]]


def test_a_checkpoint_is_a_plain_hugging_face_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    write_corpus(tmp_path / "text")
    trainer = Trainer(tiny_recipe(tmp_path, train={"max_steps": 2}), quiet=True)
    trainer.fit()
    folder = find_source(trainer.folder).folder
    checkpoint.verify(folder)
    # Nothing in it can execute code when read.
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors", ".yaml"}
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert "toolkit" not in (folder / "config.json").read_text()
    assert plain.config._attn_implementation in ("sdpa", "eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id == 0
    for name, tensor in trainer.hf_model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name])
    ids = tokenizer("total = f(3)\n", return_tensors="pt")["input_ids"][:, :30]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, trainer.hf_model.eval()(ids).logits, rtol=1e-4, atol=1e-5)
