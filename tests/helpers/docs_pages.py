"""Pages of the documentation whose examples run as written."""

import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs"


def run_examples(page: str, count: int) -> dict[str, Any]:
    """Run the ``count`` Python examples of a page, one after the other; the names that they leave."""
    blocks = re.findall(r"```python\n(.*?)```", (FOLDER / page).read_text(), re.S)
    assert len(blocks) == count
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names
