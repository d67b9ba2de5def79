"""The examples of the page on inference run as written, one after the other."""

from tests.helpers.docs_pages import run_examples


def test_the_examples_run_as_written(capsys):
    names = run_examples("inference.md", 8)
    assert names["ids"].shape[0] == 4
    assert "FINISHED" in capsys.readouterr().out
    assert "generate" not in names["model"].__dict__
