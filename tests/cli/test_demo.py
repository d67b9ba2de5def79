"""The demo's recipe and overrides fit together, and notices of libraries stay off the terminal."""

import logging
import subprocess
import sys

from toolkit.cli import demo
from toolkit.cli.quiet import Without, silence_libraries
from toolkit.config import load_recipe


def test_the_overrides_are_of_the_recipe():
    recipe = load_recipe("recipes/pretrain.yaml", ["run_name=demo", "overwrite=true", *demo.SHORT])
    assert recipe.run_name == "demo"


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(demo, "PRETRAINED", "no_such_package")
    assert demo._pretrained(full=False) == 0
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert "skipped" in line


def test_notices_are_dropped_and_errors_are_not(caplog):
    silence_libraries()
    silence_libraries()
    logger = logging.getLogger("transformers.tokenization_utils_base")
    assert sum(isinstance(one, Without) for one in logger.filters) == 1
    filter_ = next(one for one in logger.filters if isinstance(one, Without))

    def passes(text: str) -> bool:
        return filter_.filter(logging.LogRecord("x", logging.WARNING, "f", 1, text, None, None))

    assert not passes("Token indices sequence length is longer than the specified maximum (9 > 8)")
    assert passes("The tokenizer is broken")


def test_a_command_writes_nothing_on_standard_error(tmp_path):
    """``toolkit verify`` of a random model: what torch, transformers and accelerate say while imported is dropped."""
    command = [sys.executable, "-m", "toolkit.cli", "verify", "--random", "llama", "--tokens", "20", "--no-overhead"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert result.stderr == ""
    assert result.stdout.startswith("random llama")
