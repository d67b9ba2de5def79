"""Pages of the documentation whose examples run as written."""

import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs"

PAGE_URL = "http://127.0.0.1:8000"
"""Of the server in examples."""


def run_examples(page: str, count: int, url: str = "", **given: Any) -> dict[str, Any]:
    """Run the ``count`` Python examples of a page, one after the other; the names that they leave.

    Args:
        url: of a server, in the place of the page's.
        given: names that the examples use.
    """
    blocks = re.findall(r"```python\n(.*?)```", (FOLDER / page).read_text(), re.S)
    assert len(blocks) == count
    names: dict[str, Any] = dict(given)
    for block in blocks:
        exec(compile(block.replace(PAGE_URL, url or PAGE_URL), page, "exec"), names)
    return names
