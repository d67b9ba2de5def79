"""Which cases of the tests are too long for ``make test``: measured, and listed in tests/long_tests.txt.

::

    make test PYTEST_ADDOPTS="--durations=0 --durations-min=0.05" > log
    python -m tools.long_tests log --seconds 0.3 --alone 2.5

Cases that took longer run in the sweep (tests/conftest.py). One case of each test stays, the shortest, unless it alone
takes longer than ``--alone``. What proves that training and serving agree (``STAYS``) stays whole. Entries of cases
that the log does not have, such as those that are listed already, are kept.
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path

LIST = Path(__file__).parent.parent / "tests" / "long_tests.txt"
STAYS = "tests/test_parity.py::"
_LINE = re.compile(r"^ *([\d.]+)s call +(tests/\S+?::.+)$")


def durations(log: str) -> dict[str, float]:
    """Seconds of each case that pytest's ``--durations`` printed."""
    found: dict[str, float] = defaultdict(float)
    for line in log.splitlines():
        if match := _LINE.match(line):
            found[match[2].rstrip()] += float(match[1])
    return dict(found)


def long_cases(seconds_of: dict[str, float], most: float, alone: float) -> set[str]:
    """Cases over ``most`` seconds, but of a test all of whose measured cases are, the shortest if up to ``alone``."""
    of_test: dict[str, list[str]] = defaultdict(list)
    for case in seconds_of:
        if not case.startswith(STAYS):
            of_test[case.partition("[")[0]].append(case)
    found = {case for cases in of_test.values() for case in cases if seconds_of[case] > most}
    for cases in of_test.values():
        shortest = min(cases, key=lambda case: seconds_of[case])
        if seconds_of[shortest] <= alone:
            found.discard(shortest)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="output of pytest with --durations=0")
    parser.add_argument("--seconds", type=float, default=0.3, help="that a case may take (0.3)")
    parser.add_argument("--alone", type=float, default=2.5, help="that the shortest case of a test may take (2.5)")
    args = parser.parse_args()
    measured = durations(args.log.read_text(encoding="utf-8"))
    before = set(LIST.read_text(encoding="utf-8").splitlines()) if LIST.exists() else set()
    cases = sorted((before - measured.keys()) | long_cases(measured, args.seconds, args.alone))
    LIST.write_text("".join(f"{case}\n" for case in cases), encoding="utf-8")
    moved = sum(measured.get(case, 0.0) for case in cases)
    print(f"{len(cases)} cases; {moved:.0f} of {sum(measured.values()):.0f} s measured")


if __name__ == "__main__":
    main()
