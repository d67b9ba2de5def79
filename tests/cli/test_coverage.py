"""``toolkit coverage`` on a few architectures: what holds, and what is refused and why."""

import re

import pytest

from toolkit.cli import main


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt2", ""),  # weights [K, N]
        ("opt", ""),  # scales its queries itself; the gradient of its keys' bias is 0
        ("gemma3_text", ""),  # rotary tables of two kinds
        ("olmo3", ""),  # windows in some layers
        ("nemotron_h", ""),  # layers without state, and a mixture
        ("bart", "takes a token's position from its place in the batch"),
        ("bloom", "a ragged batch needs it patched"),
    ],
)
def test_an_architecture_is_covered_or_refused(name, reason, capsys):
    assert main(["coverage", name, "--workers", "1"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {name} |"))
    assert re.match(rf"\| {name} \| {'refused' if reason else 'covered'} \|", row), row
    assert reason in row


def test_unknown_architectures_are_named(capsys):
    assert main(["coverage", "lama"]) == 2
    assert "architecture is 'lama'; allowed are model types of transformers; did you mean" in capsys.readouterr().err
