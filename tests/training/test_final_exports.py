"""Recipes with ``export``: formats that a run writes after its last step."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.helpers.objective_recipes import WARMUP, objective_recipe
from toolkit.errors import ToolkitError
from toolkit.exporting import MANIFEST
from toolkit.training.loop import Trainer, train


def exporting(tmp_path: Path, *sections: dict[str, Any], **changed: Any) -> Any:
    model = {"lora": {"r": 4}}
    return objective_recipe(tmp_path, "sft", {"warmup": WARMUP}, model=model, export=list(sections), **changed)


@pytest.mark.sweep
def test_a_run_ends_with_its_exports_and_again_where_it_is_resumed(tmp_path: Path) -> None:
    sections = {"to": "hf"}, {"to": "peft"}, {"to": "gguf", "quantise": "q8_0", "check": False}
    result = train(exporting(tmp_path, *sections), quiet=True)
    folder = tmp_path / "runs" / "sft"
    merged, adapter, gguf = result["exports"]
    assert [one["path"] for one in result["exports"]] == ["export/hf", "export/peft", "export/gguf-q8_0"]
    assert merged["equal_prompts"] == adapter["equal_prompts"] == 8
    assert gguf["consumer"] is None
    assert json.loads((folder / "result.json").read_text())["exports"] == result["exports"]
    assert not any("lora" in name for name in load_file(folder / "export/hf/model.safetensors"))
    assert (folder / "export/gguf-q8_0/model.gguf").is_file()
    assert not (folder / "warmup" / "export").exists()

    again = train(exporting(tmp_path, {"to": "hf"}, resume_from_checkpoint=True), quiet=True)
    assert [one["path"] for one in again["exports"]] == ["export/hf"]
    assert [path.name for path in (folder / "export").iterdir()] == ["hf"]
    assert (folder / "export/hf" / MANIFEST).is_file()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ([{"to": "hf"}, {"to": "tflite"}], r"export\[1\]\.to must be one of .*gguf.*got 'tflite'"),
        ([{"to": "gguf", "quantise": "int4"}], r"export\[0\]\.quantise must be one of .*q8_0.*got 'int4'"),
        ([{"to": "hf", "imatrix": "a.txt"}], r"export\[0\]\.imatrix must not be given for 'hf', got 'a.txt'"),
        ([{"to": "hf"}, {"to": "hf"}], r"export\[1\] must differ from the others, got 'hf' again"),
    ],
)
def test_what_cannot_be_written_is_refused_before_a_step(
    tmp_path: Path, sections: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ToolkitError, match=message):
        Trainer(exporting(tmp_path, *sections), quiet=True)
    assert not (tmp_path / "runs").exists()


def test_adapters_alone_need_adapters(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match=r"export\[0\]\.to must be a target of whole models without model\.lora"):
        Trainer(objective_recipe(tmp_path, "sft", {}, export=[{"to": "peft"}]), quiet=True)


def test_a_run_whose_export_fails_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.exporting.hf import HuggingFace

    def full(self: Any, job: Any, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HuggingFace, "write", full)
    with pytest.raises(ToolkitError, match=r"The run is complete, but export\[0\] failed: The disk is full"):
        train(exporting(tmp_path, {"to": "hf"}), quiet=True)
    folder = tmp_path / "runs" / "sft"
    assert "exports" not in json.loads((folder / "result.json").read_text())
    assert list((folder / "checkpoints").iterdir())
    assert not list((folder / "export").glob("*"))
