"""Wrong recipes, models, requests and checkpoints: one clear sentence, status 2, nothing half-written.

(Wrong HTTP requests have their own list in tests/serving/test_server.py: a 4xx and one sentence each.)
"""

import json
import shutil

import pytest
import yaml

from toolkit.cli import main
from toolkit.testing.models import random_model, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    random_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def work(checkpoint, tmp_path, monkeypatch):
    """A folder with a good checkpoint, spoilt ones, and a small recipe."""
    monkeypatch.chdir(tmp_path)

    def spoilt(name, **files):
        shutil.copytree(checkpoint, tmp_path / name)
        for file, text in files.items():
            path = tmp_path / name / file.replace("__", ".")
            path.unlink(missing_ok=True)
            if text is not None:
                path.write_text(text)

    shutil.copytree(checkpoint, tmp_path / "good")
    spoilt("no_config", config__json=None)
    spoilt("bad_config", config__json="{ not json")
    spoilt("unknown_type", config__json=json.dumps({"model_type": "nonesuch"}))
    spoilt("no_weights", model__safetensors=None)
    spoilt("cut_weights", model__safetensors="short")
    spoilt("pickled", model__safetensors=None, pytorch_model__bin="not read")
    spoilt("bad_tokenizer", tokenizer__json="{}")
    spoilt("no_tokenizer", tokenizer__json=None, tokenizer_config__json=None)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("kept")
    recipe = {
        "run_name": "bad",
        "model": {"name_or_path": "good"},
        "data": {"data_dir": "good", "include": ["*"], "val_set_size": 0.5},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "broken.yaml").write_text("name: [unclosed\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    return tmp_path


WRONG = [
    (["train", "missing.yaml"], "missing.yaml"),
    (["train", "broken.yaml"], "broken.yaml"),
    (["train", "list.yaml"], "list.yaml"),
    (["train", "recipe.yaml", "train.max_step=3"], "train.max_steps"),
    (["train", "recipe.yaml", "train.max_steps=many"], "train.max_steps"),
    (["train", "recipe.yaml", "train.max_steps=0"], "train.max_steps"),
    (["train", "recipe.yaml", "optimizer.learning_rate=-1"], "optimizer.learning_rate"),
    (["train", "recipe.yaml", "model.numerics=exact"], "model.numerics"),
    (["train", "recipe.yaml", "model.name_or_path=nowhere"], "nowhere"),
    (["train", "recipe.yaml", "data.data_dir=nowhere"], "nowhere"),
    (["train", "recipe.yaml", "resume_from_checkpoint=step-7"], "step-7"),
    (["train", "recipe.yaml", "resume_from_checkpoint=step-7", "--resume"], "contradict each other"),
    (["train", "recipe.yaml", "resume_from_checkpoint=false", "--resume"], "contradict each other"),
    (["train", "recipe.yaml", "model.name_or_path=no_tokenizer"], "must hold a tokenizer, got 'no_tokenizer'"),
    (["generate", "nowhere", "text"], "nowhere"),
    (["generate", "no_config", "text"], "config.json"),
    (["generate", "bad_config", "text"], "config.json"),
    (["generate", "unknown_type", "text"], "nonesuch"),
    (["generate", "no_weights", "text"], "safetensors"),
    (["generate", "cut_weights", "text"], "safetensors"),
    (["generate", "pickled", "text"], "safetensors"),
    (["generate", "bad_tokenizer", "text"], "tokenizer"),
    (["generate", "good", "text", "--temperature", "-1"], "temperature"),
    (["generate", "good", "text", "--max-tokens", "100000"], "max_tokens"),
    (["export", "good", "taken"], "taken"),
    (["export", "good", "new", "--to", "gguff"], "gguff"),
    (["export", "nowhere", "new"], "nowhere"),
    (["verify", "good", "--tokens", "0"], "--tokens"),
    (["verify"], "model folder"),
    (["verify", "--random", "lama"], "llama"),
    (["patches", "good", "--roles", "norms"], "norm"),
    (["serve", "no_weights"], "safetensors"),
    (["serve", "good", "--max-num-seqs", "0"], "max_num_seqs"),
]


@pytest.mark.parametrize(("words", "named"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_one_sentence_and_nothing_written(words, named, work, capsys):
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    assert main(words) == 2
    captured = capsys.readouterr()
    said = captured.err.strip()
    assert said.startswith("toolkit: "), said
    assert len(said.splitlines()) == 1, said
    assert said.endswith((".", "?")), said
    assert named in said
    assert "Traceback" not in said
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == before
