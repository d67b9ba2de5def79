"""``objective.datasets``: every kind of file gives the same lines; mixtures, columns, weights, splits and bad rows."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.helpers.objective_recipes import check_resumes, objective_recipe
from toolkit.config.objective import DatasetSection
from toolkit.errors import ToolkitError
from toolkit.training.examples import LineStream
from toolkit.training.formats import SFT_FORMATS, check, read
from toolkit.training.given import GivenLines, open_lines
from toolkit.training.loop import Trainer
from toolkit.training.objectives.sft import SFTSection

ROWS = [{"prompt": f"question {at}", "completion": f"answer {at}"} for at in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    """The rows as a dataset of this kind; its path."""
    path = folder / f"data.{kind}"
    table = datasets.Dataset.from_list(rows)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "csv":
        table.to_csv(path)
    elif kind == "tsv":
        table.to_csv(path, sep="\t")
    elif kind == "saved":
        table.save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        table.to_parquet(path / "train-00000-of-00001.parquet")
    return str(path)


def opened(*sections: dict[str, Any], **more: Any) -> GivenLines:
    section = SFTSection.model_validate({"kind": "sft", "datasets": list(sections), **more})
    found = open_lines(section, lambda line: check(line, SFT_FORMATS))
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "tsv", "saved", "folder"])
def test_every_kind_of_file_gives_the_same_lines(kind: str, tmp_path: Path) -> None:
    lines = opened({"path": write(tmp_path, kind, ROWS)})
    assert sorted((*lines.train, *lines.held_out), key=lambda line: line.number) == [
        (number, row, lines.train[0].path) for number, row in enumerate(ROWS, 1)
    ]
    assert 0 < len(lines.held_out) < 20
    again = opened({"path": write(tmp_path, kind, ROWS[::-1])}) if kind in ("jsonl", "json") else None
    assert again is None or again.fingerprint != lines.fingerprint


def test_conversations_of_arrow_have_no_null_fields(tmp_path: Path) -> None:
    """Arrow gives every message the keys of all; the template must see those of the line alone."""
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}], "tools": "[]"},
    ]
    path = write(tmp_path, "parquet", [{**rows[0], "tools": None}, rows[1]])
    lines = opened({"path": path}, evaluation={"val_set_size": 1e-9})
    assert [line.value for line in lines.train] == rows


def test_columns_and_alpaca(tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "answer": row["completion"], "id": at} for at, row in enumerate(ROWS)]
    columns = {"prompt": "question", "completion": "answer"}
    for kind in ("jsonl", "parquet"):
        lines = opened({"path": write(tmp_path, kind, rows), "columns": columns})
        assert lines.train[0].value == {**ROWS[lines.train[0].number - 1], "id": lines.train[0].number - 1}
        with pytest.raises(
            ToolkitError, match="lines 1, 2, 3, 4, 5 and 35 more, must be a JSON object with 'messages'"
        ):
            opened({"path": write(tmp_path, kind, rows)})
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."}
    assert read(alpaca, SFT_FORMATS) == {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add.\n\n1 2"}],
        "completion": [{"role": "assistant", "content": "3"}],
    }
    del alpaca["input"], alpaca["system"]
    assert read(alpaca, SFT_FORMATS)["prompt"] == [{"role": "user", "content": "Add."}]


def test_datasets_have_their_weights_in_every_epoch(tmp_path: Path) -> None:
    other = [{"text": f"text {at}"} for at in range(30)]
    lines = opened(
        {"path": write(tmp_path, "parquet", ROWS), "weight": 0.5},
        {"path": write(tmp_path, "jsonl", other), "weight": 2.5, "max_samples": 10},
        evaluation={"val_set_size": 1e-9},
    )
    assert [count for count, _ in lines.shares] == [40, 10]
    assert [line.value for line in lines.firsts()] == [ROWS[0], lines.train[40].value]
    stream = LineStream(lines.train, 0, shares=lines.shares)
    epochs = [Counter(line.value.get("text", line.value.get("prompt")) for line in stream.take(45)) for _ in range(2)]
    for epoch in epochs:
        questions, texts = ({k: v for k, v in epoch.items() if k.startswith(start)} for start in ("question", "text"))
        assert list(questions.values()) == [1] * 20
        assert sorted(texts.values()) == [2] * 5 + [3] * 5
    assert epochs[0] != epochs[1]
    # Two processes share one epoch.
    shares = [LineStream(lines.train, 0, rank=rank, world_size=2, shares=lines.shares) for rank in range(2)]
    together = Counter(line.value.get("text", line.value.get("prompt")) for one in shares for line in one.take(22))
    assert sum((together - epochs[0]).values()) == 0


def test_without_weights_the_order_is_what_it_was(tmp_path: Path) -> None:
    rows = list(range(17))
    ours, plain = LineStream(rows, 3, shares=[(9, 1.0), (8, 1.0)]), LineStream(rows, 3)
    assert ours.take(40) == plain.take(40)


def test_eval_datasets_hold_out_nothing_of_the_others(tmp_path: Path) -> None:
    held_out = {"path": write(tmp_path, "csv", ROWS[:7]), "max_samples": 5}
    lines = opened({"path": write(tmp_path, "parquet", ROWS)}, eval_datasets=[held_out])
    assert (len(lines.train), len(lines.held_out)) == (40, 5)


def test_bad_rows_are_named_with_their_dataset(tmp_path: Path) -> None:
    good = write(tmp_path, "jsonl", ROWS)
    (tmp_path / "bad").mkdir()
    bad = write(tmp_path / "bad", "parquet", [*ROWS[:3], {"prompt": "p", "completion": None}])
    with pytest.raises(ToolkitError, match=r"objective.datasets\[1\] '.*parquet', line 4, must be a JSON object"):
        opened({"path": good}, {"path": bad})
    lines = opened({"path": good}, {"path": bad}, on_bad_lines="skip")
    assert [(line.number, line.path) for line in lines.bad] == [(4, bad)]


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"path": "{folder}/none.parquet"}, r"objective.datasets\[0\] must be a dataset that can be opened, got "),
        ({"path": "{folder}/data.parquet", "split": "test"}, r"with split 'test' \("),
        ({"path": "{folder}/data.xyz"}, r"objective.datasets\[0\].path must be a .jsonl, .parquet"),
        ({"path": "{folder}/data.jsonl", "weight": 0.001}, "must have a line to train on, got none"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(section: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    for kind in ("parquet", "jsonl"):
        write(tmp_path, kind, ROWS)
    (tmp_path / "data.xyz").write_text("x")
    with pytest.raises(ToolkitError, match=sentence) as raised:
        opened({**section, "path": section["path"].format(folder=tmp_path)})
    assert "\n" not in str(raised.value)


def test_contradictions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"exactly one of objective.task, objective.data_files and objective.datasets"):
        SFTSection(data_files="x", datasets=[DatasetSection(path="x")])
    with pytest.raises(ValueError, match=r"eval_datasets must be null without objective.datasets"):
        SFTSection(data_files="x", eval_datasets=[DatasetSection(path="x")])


def test_a_run_on_two_datasets_resumes_exactly(tmp_path: Path) -> None:
    given = [
        {"path": write(tmp_path, "parquet", ROWS), "weight": 1.5},
        {"path": write(tmp_path, "csv", [{"text": f"{at} and {at}"} for at in range(20)])},
    ]
    recipe = objective_recipe(tmp_path, "sft", {"task": None, "datasets": given})
    whole = Trainer(recipe, quiet=True)
    whole.fit()
    check_resumes(whole, recipe)
