"""Signs of life of a process that another one has started: a byte every so often, through a pipe."""

import os
import select
import threading
import time
from collections.abc import Callable

LARGEST_INTERVAL = 1.0


def interval_of(timeout: float) -> float:
    """Seconds between two signs where none for ``timeout`` seconds is too long."""
    return min(LARGEST_INTERVAL, timeout / 8)


def give(pipe: int, timeout: float) -> None:
    """Give signs of life from a thread, as long as this process runs and somebody has the other end.

    Args:
        pipe: the end to write to, which this process inherited.
        timeout: as for ``watch``.
    """
    os.set_inheritable(pipe, False)

    def beat() -> None:
        try:
            while True:
                os.write(pipe, b".")
                time.sleep(interval_of(timeout))
        except OSError:  # the other process has ended
            os.close(pipe)

    threading.Thread(target=beat, name="signs of life", daemon=True).start()


def watch(pipe: int, timeout: float, lost: Callable[[], None]) -> None:
    """Call ``lost`` once, on another thread, when there was no sign of life for ``timeout`` seconds after a first one.

    Time in which this process itself was stopped does not count: what is counted are its own waits.

    Args:
        pipe: the end to read from, which is closed when the other process ends.
    """

    def wait() -> None:
        first, waited = True, 0.0
        while waited < timeout:
            ready, _, _ = select.select([pipe], [], [], None if first else interval_of(timeout))
            if not ready:
                waited += interval_of(timeout)
                continue
            first, waited = False, 0.0
            if not os.read(pipe, 65536):
                break
        else:
            lost()
        os.close(pipe)

    threading.Thread(target=wait, name="watches signs of life", daemon=True).start()
