"""The README's Python runs as written, and its commands exist."""

import re
from pathlib import Path

from toolkit.cli import COMMANDS

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_example_runs_as_written(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_the_commands_of_the_readme_exist():
    named = set(re.findall(r"^toolkit (\w+)", README, re.M))
    assert named
    assert named <= set(COMMANDS)
