"""The examples of the page on protocols run as written, against a real server process."""

import re

from tests.helpers.docs_pages import run_examples
from tests.helpers.server_process import serving


def test_the_examples_run_as_written(talking_model, capsys):
    with serving(talking_model, "--port", "0") as server:
        run_examples("protocols.md", 3, server.url, MODEL="tiny")
    printed = capsys.readouterr().out
    # The texts are sampled, and may end before their limit.
    assert re.search(r" (max_tokens|end_turn)\n.* (in)?complete(d)?\n", printed, re.DOTALL)
