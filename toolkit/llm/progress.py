"""A progress bar on standard error."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Bar = bool | Callable[..., Any] | None
"""True shows it, False does not, None where standard error is a terminal; or a class in the place of ``tqdm``."""


@contextmanager
def progress(asked: Bar, total: int, about: str, unit: str) -> Iterator[Callable[[int], None]]:
    """What is to be told how many more are done."""
    if asked is False or (asked is None and not sys.stderr.isatty()):
        yield lambda count: None
        return
    from tqdm import tqdm

    make = asked if callable(asked) else tqdm
    with make(total=total, desc=about, unit=unit, dynamic_ncols=True, file=sys.stderr) as bar:
        yield bar.update
