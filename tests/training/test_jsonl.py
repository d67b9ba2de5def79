"""Lines of a json lines file: what the format allows is read, what cannot be trained on is named or skipped."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import ToolkitError
from toolkit.training.formats import PREFERENCE_FORMATS, SFT_FORMATS, check, preference, read
from toolkit.training.jsonl import JsonlDataset

GOOD = {"prompt": "a", "completion": "b"}
ODD = "one\u2028two\u2029three\u0085four\x0bfive\x0csix\ufeffseven\x1ceight"
"""Everything that Python takes for the end of a line, and a byte order mark, as text."""
BAD: list[tuple[str, str]] = [
    ('{"prompt": "a"', "must be a JSON object (Expecting ',' delimiter at character 15)"),
    ("[1, 2]", "must be a JSON object, got an array"),
    ("null", "must be a JSON object, got null"),
    ('{"prompt": "a", "completion": null}', "got 'prompt' as a string and 'completion' as null"),
    ('{"prompt": 3, "completion": "b"}', "got 'prompt' as a number and 'completion' as a string"),
    ('{"prompt": [], "completion": "a"}', "got 'prompt' as an array and 'completion' as a string"),
    ('{"prompt": "a", "completion": []}', "must have messages in 'completion', got none"),
    (
        '{"question": "a"}',
        "must be a JSON object with 'messages', or 'prompt' and 'completion', or 'text', got 'question'",
    ),
    ('{"prompt": "a", "completion": "b", "score": NaN}', "must be JSON, which has no NaN"),
    ('{"prompt": "a", "completion": "b", "score": -Infinity}', "must be JSON, which has no -Infinity"),
    ('{"prompt": "a", "prompt": "c", "completion": "b"}', "must have each key once, got 'prompt' twice"),
    ('{"prompt": "a\\ud83d", "completion": "b"}', "must be Unicode without lone surrogates, got U+D83D"),
    ('{"messages": []}', "must have messages in 'messages', got none"),
    ('{"messages": [{"content": "a"}]}', "must have an object with 'role' in messages[0]"),
    ('{"messages": [{"role": "user", "content": 3}]}', "must have 'content' as a string or parts in messages[0]"),
    ('{"messages": [{"role": "user", "content": "a"}], "tools": 3}', "must have 'tools' as a list"),
    (
        '{"messages": [{"role": "assistant", "content": null, "tool_calls": "x"}]}',
        "must have 'tool_calls' as a list in messages[0], got a string",
    ),
    ("[" * 100_000, "must be a JSON object (it is nested too deeply)"),
]


def dataset(path: Path, content: bytes, **options: Any) -> JsonlDataset:
    path.write_bytes(content)
    return JsonlDataset(str(path), 1e-9, lambda line: check(line, SFT_FORMATS), **options)


def lines(*texts: str, end: str = "\n") -> bytes:
    return "".join(text + end for text in texts).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, end: str) -> None:
    odd = {"prompt": ODD, "completion": "b" * 100_000}
    texts = [json.dumps(odd, ensure_ascii=False), "", " \t", "\ufeff" + json.dumps(GOOD), json.dumps(odd)]
    found = dataset(tmp_path / "data.jsonl", b"\xef\xbb\xbf" + lines(*texts, end=end))
    assert [(line.number, line.value) for line in found.train] == [(1, odd), (4, GOOD), (5, odd)]
    assert found.train[1:][-1].value == found.train[2].value == odd
    last = dataset(tmp_path / "open.jsonl", lines(*texts)[:-1])
    assert last.train[-1].value == odd


@pytest.mark.parametrize(("text", "reason"), BAD)
def test_a_bad_line_is_named(tmp_path: Path, text: str, reason: str) -> None:
    content = lines(json.dumps(GOOD), "", text, json.dumps(GOOD))
    with pytest.raises(ToolkitError) as caught:
        dataset(tmp_path / "data.jsonl", content)
    assert "data.jsonl', line 3, must " in str(caught.value)
    assert reason in str(caught.value)
    assert "objective.on_bad_lines=skip" in str(caught.value)
    assert "\n" not in str(caught.value)
    skipped = dataset(tmp_path / "data.jsonl", content, on_bad_lines="skip")
    assert [line.number for line in skipped.train] == [1, 4]
    assert [line.number for line in skipped.bad] == [3]


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    content = lines(json.dumps(GOOD)) + b'{"prompt": "caf\xe9", "completion": "b"}\n' + lines('{"prompt": "\ud800"}')
    with pytest.raises(
        ToolkitError, match=r"line 2, must be UTF-8, got byte 0xE9; line 3, must be UTF-8, got byte 0xED"
    ):
        dataset(tmp_path / "data.jsonl", content)


def test_all_bad_lines_are_one_sentence(tmp_path: Path) -> None:
    content = lines(*["{"] * 12, "[]", json.dumps(GOOD))
    with pytest.raises(ToolkitError, match=r"lines 1, 2, 3, 4, 5 and 7 more, must .*; line 13, must .*an array\. M"):
        dataset(tmp_path / "data.jsonl", content)
    with pytest.raises(ToolkitError, match=r"must have a line to train on, .* of which 12 lines are skipped"):
        dataset(tmp_path / "data.jsonl", lines(*["{"] * 12), on_bad_lines="skip")


def test_gzip_reads_as_its_content_and_other_formats_are_told(tmp_path: Path) -> None:
    content = lines(*(json.dumps({**GOOD, "n": at}) for at in range(50)))
    plain, packed = (
        JsonlDataset(str(path), 0.3, lambda line: check(line, SFT_FORMATS))
        for path in (tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz")
        if path.write_bytes(content if path.suffix == ".jsonl" else gzip.compress(content))
    )
    for one, other in ((plain.train, packed.train), (plain.held_out, packed.held_out)):
        assert [line[:2] for line in one] == [line[:2] for line in other]
    assert plain.fingerprint == packed.fingerprint
    for other, reason in (
        (b"PAR1xxxx", r"plain or gzip, got '.*' \(parquet\)"),
        (bz2.compress(content), r"plain or gzip, got '.*' \(bzip2\)"),
        (lzma.compress(content), r"plain or gzip, got '.*' \(xz\)"),
        (b"[{}]", r"an object on each line, got '.*' \(an array\)"),
        ("{}".encode("utf-16"), r"in UTF-8, got '.*' \(UTF-16\)"),
        (gzip.compress(content)[:-20], "must be a whole gzip file"),
    ):
        with pytest.raises(ToolkitError, match=reason):
            dataset(tmp_path / "c.jsonl", other)


def test_formats_of_trl() -> None:
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    shared = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for line in (
        {"messages": turn},
        {"conversations": shared},
        {"conversations": turn},
        {"messages": turn, "text": "x"},
    ):
        assert read(line, SFT_FORMATS) == {"messages": turn}
    assert read({"prompt": turn[:1], "completion": turn[1:], "x": 1}, SFT_FORMATS) == {
        "prompt": turn[:1],
        "completion": turn[1:],
    }
    assert read({"text": "x"}, SFT_FORMATS) == {"text": "x"}
    for line, expected in (
        ({"prompt": "q ", "chosen": "a", "rejected": "b"}, ("q ", "a", "b")),
        ({"chosen": "q is a", "rejected": "q is b"}, ("q is", " a", " b")),
        ({"chosen": turn, "rejected": [turn[0], shared[1] | {"value": "b"}]}, None),
    ):
        prompt, chosen, rejected = preference(read(line, PREFERENCE_FORMATS))
        assert (prompt, chosen, rejected) == (expected or (turn[:1], turn[1:], [{"role": "assistant", "content": "b"}]))
