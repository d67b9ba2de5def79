"""The examples of the page on structured output run as written, one after the other."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "structured-output.md").read_text()


def test_the_examples_run_as_written(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, "structured-output.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "'name'" in printed
    assert "must not have 'uniqueItems' in a JSON schema, which cannot be enforced." in printed
