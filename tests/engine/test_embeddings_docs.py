"""The examples of the page on embeddings run as written, one after the other."""

from tests.helpers.docs_pages import run_examples


def test_the_examples_run_as_written(capsys):
    names = run_examples("embeddings.md", 2)
    assert "user: Hello" in capsys.readouterr().out
    assert names["reward"].shape == (1,)
