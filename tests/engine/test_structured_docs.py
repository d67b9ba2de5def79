"""The examples of the page on structured output run as written, one after the other."""

from tests.helpers.docs_pages import run_examples


def test_the_examples_run_as_written(capsys):
    run_examples("structured-output.md", 3)
    printed = capsys.readouterr().out
    assert "'name'" in printed
    assert "must not have 'uniqueItems' in a JSON schema, which cannot be enforced." in printed
