"""The examples of the page on inference run as written, one after the other."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "inference.md").read_text()


def test_the_examples_run_as_written(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 8
    names: dict = {}
    for block in blocks:
        exec(compile(block, "inference.md", "exec"), names)
    assert names["ids"].shape[0] == 4
    assert "FINISHED" in capsys.readouterr().out
    assert "generate" not in names["model"].__dict__
