"""Which cases of the tests run one level later for their length: measured, and listed in tests/*_tests.txt.

::

    make test PYTEST_ADDOPTS="--durations=0 --durations-min=0.05" > log
    python -m tools.long_tests log --level sweep
    make sweep PYTEST_ADDOPTS="--durations=0 --durations-min=0.05" > log
    python -m tools.long_tests log --level soak

Cases that took longer than the level before allows run in ``--level`` (tests/conftest.py). One case of each test stays,
the shortest, unless it alone takes longer than ``--alone``. What proves that training and serving agree stays whole in
``make test``; small sizes of benchmarks name their level themselves. Entries of cases that the log does not have, such
as those that are listed already, are kept.
"""

import argparse
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"


@dataclass(frozen=True)
class Level:
    """A level of the tests. What stays in the one before: up to ``seconds``, a test's shortest up to ``alone``."""

    list: Path
    seconds: float
    alone: float
    stays: tuple[str, ...] = ()


LEVELS = {
    "sweep": Level(TESTS / "sweep_tests.txt", 0.3, 2.5, stays=("tests/test_parity.py::",)),
    "soak": Level(TESTS / "soak_tests.txt", 4, 20, stays=("tests/test_benchmark_commands.py::",)),
}
_LINE = re.compile(r"^ *([\d.]+)s call +(tests/\S+?::.+)$")


def durations(log: str) -> dict[str, float]:
    """Seconds of each case that pytest's ``--durations`` printed."""
    found: dict[str, float] = defaultdict(float)
    for line in log.splitlines():
        if match := _LINE.match(line):
            found[match[2].rstrip()] += float(match[1])
    return dict(found)


def long_cases(seconds_of: dict[str, float], most: float, alone: float, stays: tuple[str, ...] = ()) -> set[str]:
    """Cases over ``most`` seconds, but of a test all of whose measured cases are, the shortest if up to ``alone``."""
    of_test: dict[str, list[str]] = defaultdict(list)
    for case in seconds_of:
        if not case.startswith(stays):
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
    parser.add_argument("--level", choices=LEVELS, default="sweep", help="where they run (sweep)")
    parser.add_argument("--seconds", type=float, help="that a case may take in the level before")
    parser.add_argument("--alone", type=float, help="that the shortest case of a test may take there")
    args = parser.parse_args()
    level = LEVELS[args.level]
    most = level.seconds if args.seconds is None else args.seconds
    alone = level.alone if args.alone is None else args.alone
    measured = durations(args.log.read_text(encoding="utf-8"))
    before = set(level.list.read_text(encoding="utf-8").splitlines())
    cases = sorted((before - measured.keys()) | long_cases(measured, most, alone, level.stays))
    level.list.write_text("".join(f"{case}\n" for case in cases), encoding="utf-8")
    moved = sum(measured.get(case, 0.0) for case in cases)
    print(f"{len(cases)} cases; {moved:.0f} of {sum(measured.values()):.0f} s measured")


if __name__ == "__main__":
    main()
