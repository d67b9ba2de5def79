"""``toolkit init``: recipes that are valid, with a schema beside them and a comment on every key that was lost."""

import json

import jsonschema
import pytest
import yaml

from toolkit.cli import main
from toolkit.config import load_recipe, read_yaml


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "grpo", "pretrain"])
def test_three_questions_make_a_recipe(tmp_path, capsys, kind):
    path = tmp_path / "mine.yaml"
    data = "countdown" if kind == "grpo" else "lines.jsonl"
    assert main(["init", str(path), "--objective", kind, "--model", "org/Name", "--data", data]) == 0
    recipe = load_recipe(str(path))
    assert (recipe.objective.kind, recipe.model.name_or_path, recipe.run_name) == (kind, "org/Name", f"name-{kind}")
    first, *_ = path.read_text().splitlines()
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    schema = json.loads((tmp_path / "recipe.schema.json").read_text())
    jsonschema.validate(read_yaml(path.read_text(), "mine"), schema)
    assert f"toolkit train --plan {path}" in capsys.readouterr().out


def test_replies_may_be_typed(tmp_path, monkeypatch, capsys):
    replies = iter(["sft", "org/name", "lines.jsonl"])
    monkeypatch.setattr("builtins.input", lambda _: next(replies))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    path = tmp_path / "mine.yaml"
    assert main(["init", str(path)]) == 0
    assert load_recipe(str(path)).objective.datasets[0].path == "lines.jsonl"
    assert "Which model?" in capsys.readouterr().out


def test_what_is_lost_is_said_and_written(tmp_path, capsys):
    source, path = tmp_path / "axolotl.yaml", tmp_path / "mine.yaml"
    source.write_text(yaml.safe_dump({"base_model": "org/name", "datasets": [{"path": "a.jsonl"}], "lisa_n_layers": 4}))
    assert main(["init", str(path), "--from", str(source)]) == 0
    said = "lisa_n_layers: 4 - recipes have no field for it"
    assert said in capsys.readouterr().out
    assert f"#   {said}" in path.read_text().splitlines()
    assert load_recipe(str(path)).model.name_or_path == "org/name"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--objective", "sgd"], "objective must be one of"),
        (["--from", "nowhere.yaml"], "--from must be a YAML file that can be read"),
        (["--objective", "sft"], "--model must be given"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    assert main(["init", *words]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("kept")
    assert main(["init", str(path), "--objective", "sft", "--model", "a/b", "--data", "c"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert path.read_text() == "kept"
