"""The examples of the page on HTTP run as written, one after the other."""

from tests.helpers.docs_pages import run_examples


def test_the_examples_run_as_written(capsys):
    names = run_examples("http.md", 6)
    names["engine"].shutdown()
    assert "bitwise-" in capsys.readouterr().out
