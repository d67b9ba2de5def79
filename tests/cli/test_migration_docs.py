"""The pages for users of TRL, Axolotl and Unsloth: every example runs, as it stands and in order."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from toolkit.cli import main

DOCS = Path(__file__).parents[2] / "docs"


def run_page(name: str) -> dict[str, Any]:
    """Python is executed, YAML written to the file that its first line names, commands are called; the names left."""
    names: dict[str, Any] = {}
    for language, text in re.findall(r"```(python|yaml|bash)\n(.*?)```", (DOCS / name).read_text(), re.S):
        if language == "python":
            exec(compile(text, name, "exec"), names)
        elif language == "yaml":
            Path(text.splitlines()[0].removeprefix("# ")).write_text(text)
        else:
            for line in text.splitlines():
                program, *words = shlex.split(line)
                assert program == "toolkit"
                assert main(words) == 0, line
    return names


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("page", "run", "lost"),
    [("from-trl.md", "from-trl", []), ("from-axolotl.md", "from-axolotl", []), ("from-unsloth.md", "tiny-sft", [])],
)
def test_every_example_runs(tmp_path, monkeypatch, capsys, page, run, lost):
    monkeypatch.chdir(tmp_path)
    run_page(page)
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "runs" / run / "result.json").read_text())
    assert result["global_step"] >= 1
    assert result["num_trainable_parameters"] < result["num_parameters"]
    assert " s a step on this machine" in said
    header = [line for line in (tmp_path / "mine.yaml").read_text().splitlines() if line.startswith("#")]
    assert header[0] == "# yaml-language-server: $schema=recipe.schema.json"
    assert ("# Without a counterpart:" in header) == bool(lost)


def test_the_pages_name_fields_that_recipes_have():
    from toolkit.config.load import field_names
    from toolkit.config.objective import OBJECTIVES

    known = {name for kind in OBJECTIVES.names() for name in field_names(kind=kind)}
    sections = {name.partition(".")[0] for name in known}
    for page in DOCS.glob("from-*.md"):
        for named in re.findall(r"`((?:\w+\.)+\w+)", page.read_text()):
            if named.partition(".")[0] in sections and not named.startswith("model.gradient_"):
                assert named in known, f"{page.name}: {named}"
