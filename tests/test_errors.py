"""Sentences that several packages share."""

from toolkit.errors import first_line, must_be_one_of


def test_the_first_line_of_an_error_is_one_that_says_something():
    assert first_line(ValueError("\n  out of range.\nmore")) == "out of range"
    assert first_line(ValueError("Cannot load:\n- ModuleNotFoundError: no sentencepiece\n")) == (
        "- ModuleNotFoundError: no sentencepiece"
    )
    assert first_line(RuntimeError("OSError: no such file")) == "no such file"
    assert first_line(ValueError("x" * 300), limit=10) == "x" * 10
    assert first_line(StopIteration()) == "StopIteration"
    assert first_line(StopIteration(), with_class=True) == "StopIteration"
    assert first_line(KeyError("a"), with_class=True) == "KeyError: 'a'"


def test_a_value_that_is_not_listed_gets_the_list_and_the_nearest_name():
    assert must_be_one_of("role", "nrom", ("norm", "head")) == (
        "role must be one of norm, head, got 'nrom'; did you mean 'norm'?"
    )
    assert must_be_one_of("role", 3, ("norm", "head")) == "role must be one of norm, head, got 3."
