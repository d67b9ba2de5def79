"""Lists of cases that run a level later for their length: how they are written, and that what they name is there."""

import ast
from pathlib import Path

import pytest

from tests.conftest import LONG
from tools.long_tests import durations, long_cases

ROOT = Path(__file__).parent.parent


def test_one_case_of_each_test_stays_unless_it_takes_long_alone() -> None:
    log = """
    3.00s call     tests/a.py::test_one[x-y z]
    9.50s setup    tests/a.py::test_one[x]
    2.00s call     tests/a.py::test_one[x]
    0.50s call     tests/a.py::test_two[x]
    4.00s call     tests/a.py::test_two[y]
    9.00s call     tests/a.py::test_three
    9.00s call     tests/test_parity.py::test_four
    """
    measured = durations(log)
    assert measured["tests/a.py::test_one[x]"] == 2.0
    found = {"tests/a.py::test_one[x-y z]", "tests/a.py::test_two[y]"}
    stays = ("tests/test_parity.py::",)
    assert long_cases(measured, 1.5, 9.0, stays) == found
    assert long_cases(measured, 1.5, 8.0, stays) == {*found, "tests/a.py::test_three"}
    assert long_cases(measured, 1.5, 8.0) == {*found, "tests/a.py::test_three", "tests/test_parity.py::test_four"}


@pytest.mark.parametrize("level", LONG)
def test_what_is_listed_is_there(level: str) -> None:
    tests = {line.partition("[")[0] for line in LONG[level].read_text(encoding="utf-8").splitlines()}
    for path in {test.partition("::")[0] for test in tests}:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        defined = {f"{path}::{one.name}" for one in tree.body if isinstance(one, ast.FunctionDef)}
        assert {test for test in tests if test.startswith(f"{path}::")} <= defined
