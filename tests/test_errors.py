"""Sentences that several packages share."""

import pytest

from toolkit.errors import edit_distance, first_line, must_be_one_of, nearest


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


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        ("kitten", "sitting", 3),
        ("nrom", "norm", 1),
        ("", "abc", 3),
        ("abc", "", 3),
        ("same", "same", 0),
    ],
)
def test_edits_are_counted(one, other, distance):
    assert edit_distance(one, other) == edit_distance(other, one) == distance


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("temprature", "; did you mean 'temperature'?"),
        ("temperatuer", "; did you mean 'temperature'?"),
        ("top_kk", "; did you mean 'top_k'?"),
        ("stp", "; did you mean 'stop'?"),
        ("messages", ""),
        ("length_penalty", ""),  # a field of others, which 'presence_penalty' does not stand in for
        ("max_length", ""),
        ("q", ""),
        ("", ""),
        ("x" * 10**7, ""),
    ],
    ids=lambda value: value[:20],
)
def test_only_a_misspelling_gets_a_hint(word, hint):
    fields = ("model", "prompt", "temperature", "presence_penalty", "max_tokens", "min_tokens", "top_k", "n", "stop")
    assert nearest(word, fields) == hint
