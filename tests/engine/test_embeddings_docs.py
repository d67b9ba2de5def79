"""The examples of the page on embeddings run as written, one after the other."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "embeddings.md").read_text()


def test_the_examples_run_as_written(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, "embeddings.md", "exec"), names)
    assert "user: Hello" in capsys.readouterr().out
    assert names["reward"].shape == (1,)
