"""JSON that any parser takes: no NaN, no infinity."""

import json
import math

import pytest

from toolkit.serving.openai.responses import event
from toolkit.strict_json import strict_json


def strict(text: str) -> object:
    """What a parser that keeps to RFC 8259 reads."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_is_null(number: float) -> None:
    value = {"a": [1.5, number, (number, {"b": number})], "c": "NaN"}
    assert strict(strict_json(value, indent=1)) == {"a": [1.5, None, [None, {"b": None}]], "c": "NaN"}
    assert strict(event({"logprob": number}).removeprefix("data: ")) == {"logprob": None}


def test_all_else_is_what_json_dumps_writes() -> None:
    value = {"é": [1, 2.5, None, True], "b": {"c": "x"}}
    assert strict_json(value) == json.dumps(value)
    assert strict_json(value, ensure_ascii=False, indent=2) == json.dumps(value, ensure_ascii=False, indent=2)
