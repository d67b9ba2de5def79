"""Outputs by 200 JSON schemas, judged by ``jsonschema``."""

import numpy as np
import pytest

from tests.helpers.grammar import accepts, matcher_of, random_text
from tests.helpers.json_schemas import ENFORCED, FORMATS, violation
from tests.helpers.tokenizers import make_tokenizer
from toolkit.engine.grammar.compiler import GrammarCompiler

EOS, VOCAB, MOST = 2, 352, 120


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(make_tokenizer("byte_level"), VOCAB, frozenset([EOS]))


def test_there_are_200_schemas() -> None:
    assert len({str(schema) for schema in ENFORCED}) == 200


@pytest.mark.parametrize("count", [pytest.param(4), pytest.param(50, marks=pytest.mark.sweep)])
def test_every_finished_text_is_valid(compiler: GrammarCompiler, count: int) -> None:
    tokenizer = make_tokenizer("byte_level")
    rng = np.random.default_rng(count)
    finished = 0
    for schema in ENFORCED:
        for at in range(count):
            # Without whitespace, of which random texts write more than of anything else, most of them come to an end.
            matcher = matcher_of(compiler, json=schema, disable_any_whitespace=at % 2 == 0)
            text = random_text(matcher, tokenizer, VOCAB, EOS, rng, MOST)
            if text is not None:
                finished += 1
                assert violation(schema, text) is None, (schema, text)
    assert finished > 0.8 * count * len(ENFORCED)


def taken(compiler: GrammarCompiler, schema: dict, text: str) -> bool:
    return accepts(compiler, make_tokenizer("byte_level"), VOCAB, text, json=schema)


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        ({"type": "string", "pattern": '^[^"]*$'}, ['"a"', '""', '"\\""', '"a\\"b"', '"\\\\"', '"\\n"']),
        ({"type": "string", "pattern": '^[^"\\\\]+$', "minLength": 2}, ['"ab"', '"a\\""', '"a\\\\"', '"a\\nb"']),
        ({"type": "string", "pattern": "^[^\\x00-\\x1f]+$"}, ['"a"', '"\\""', '"\\n"']),
        (
            {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "null"}},
            ['{"a":1}', '{"a":null}', '{"\\u0061":null}', '{"b":null}', '{"b":null,"b":null}'],
        ),
        (
            {"type": "object", "patternProperties": {'^[^"]$': {"type": "integer"}}, "additionalProperties": False},
            ['{"a":1}', '{"\\"":1}'],
        ),
        ({"type": "string", "format": "time"}, ['"10:11:12Z"', '"15:01:60Z"']),
        (
            {"type": "string", "format": "date-time"},
            ['"2024-02-29T10:11:12Z"', '"2023-02-29T10:11:12Z"', '"2024-02-28T10:11:60+23:00"'],
        ),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, ["0", "0.0", "0.5", "1", "1.0", "1.1", "-0"]),
        ({"type": "number", "minimum": -2, "exclusiveMaximum": -1}, ["-1", "-1.0", "-1.5", "-2"]),
    ],
)
def test_texts_are_taken_where_they_are_valid(compiler: GrammarCompiler, schema: dict, texts: list[str]) -> None:
    found = {text: taken(compiler, schema, text) for text in texts}
    valid = {text: violation(schema, text) is None for text in texts}
    assert any(valid.values())
    assert not any(found[text] and not valid[text] for text in texts)
    assert all(found[text] for text in texts if valid[text])


@pytest.mark.parametrize("year", ["0000", "0001", "0004", "0100", "0400", "1900", "2000", "2023", "2024", "9999"])
def test_dates_are_those_of_the_calendar(compiler: GrammarCompiler, year: str) -> None:
    schema = {"type": "string", "format": "date"}
    for day in ("01-31", "02-28", "02-29", "02-30", "04-31", "12-31", "13-01", "00-10", "10-00"):
        text = f'"{year}-{day}"'
        assert taken(compiler, schema, text) == (violation(schema, text) is None), text


@pytest.mark.parametrize("low", [-1.5, -1, -0.5, 0, 0.25, 1, 2])
def test_numbers_are_within_their_bounds(compiler: GrammarCompiler, low: float) -> None:
    texts = sorted({form.format(low + at / 4) for at in range(-4, 9) for form in ("{}", "{:.2f}", "{:g}")})
    for lower in ("minimum", "exclusiveMinimum"):
        for upper in ("maximum", "exclusiveMaximum"):
            schema = {"type": "number", lower: low, upper: low + 1}
            wrong = [text for text in texts if taken(compiler, schema, text) and violation(schema, text)]
            assert not wrong, schema
            assert any(taken(compiler, schema, text) for text in texts)


def test_the_validator_of_these_tests_knows_wrong_formats() -> None:
    wrong = {
        "date": "2023-02-29", "time": "24:00:00Z", "date-time": "2023-01-01 00:00:00Z", "duration": "P", "email": "@a",
        "hostname": "-a", "ipv4": "1.2.3.256", "ipv6": "1::2::3", "uuid": "0", "uri": "no scheme",
    }  # fmt: skip
    assert set(wrong) == set(FORMATS)
    for name, text in wrong.items():
        assert violation({"format": name}, f'"{text}"') is not None, name
