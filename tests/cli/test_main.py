"""The command ``toolkit`` itself: fast help, and every subcommand's."""

import subprocess
import sys

import pytest

from toolkit.cli import COMMANDS, main


def test_help_names_every_command_and_does_not_wait_for_torch():
    code = (
        "import sys, toolkit.cli\n"
        "try: toolkit.cli.main(['--help'])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "print(sorted({'torch', 'transformers', 'fastapi', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"\n    {name} " in result.stdout for name in COMMANDS)
    assert result.stdout.endswith("\n[]\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: toolkit {command}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["serv"], ["serve"], ["serve", "x", "--prot", "1"]])
def test_a_wrong_command_line_ends_with_status_2_and_the_usage(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: toolkit" in capsys.readouterr().err
