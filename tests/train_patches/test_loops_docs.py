"""docs/loops.md: every example runs as it stands, and does what the text says."""

import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from toolkit.patching import report_of

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "loops.md").read_text()
SETUP, *EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """The names that all examples use, in a separate folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(compile(SETUP, "docs/loops.md", "exec"), found)
    yield found
    AcceleratorState._reset_state(reset_partial_state=True)


def run(example: str, names: dict) -> None:
    exec(compile(example, "docs/loops.md", "exec"), names)


def test_every_loop_has_an_example():
    assert len(EXAMPLES) == 5
    for name in re.findall(r"`(train_patches/\w+\.py)`", TEXT):
        assert (ROOT / name).is_file()


def test_plain_loop(names):
    run(EXAMPLES[0], names)
    assert report_of(names["model"]) is not None


def test_trainer(names):
    run(EXAMPLES[1], names)
    assert names["trainer"].state.global_step == 3


def test_peft(names, capsys):
    run(EXAMPLES[2], names)
    (said,) = re.findall(r"fuse_adapters\(model\)\)  # (.*)", EXAMPLES[2])
    assert said in capsys.readouterr().out
    ids = torch.tensor([[1, 5, 9, 13]])
    torch.testing.assert_close(names["unpatched"](ids).logits, names["model"](ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("example", [3, 4], ids=["sft and dpo", "grpo"])
def test_trl(names, example):
    pytest.importorskip("trl")
    run(EXAMPLES[example], names)
    if example == 4:
        assert sum("mismatch/bits" in entry for entry in names["trainer"].state.log_history) == 2
