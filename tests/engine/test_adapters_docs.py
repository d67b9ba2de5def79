"""The examples of the page on adapters run as written, one after the other."""

import pytest

from tests.helpers.docs_pages import run_examples


def test_the_examples_run_as_written(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    run_examples("adapters.md", 2)
