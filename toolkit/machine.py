"""What this process may use of its machine: memory and CPUs, with the limits of its cgroups (containers)."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_bytes() -> int:
    """Bytes of memory of the machine, or of the smallest limit of the process' cgroups."""
    limits = [_number(folder / name) for folder in _folders("memory") for name in ("memory.max", _V1_MEMORY)]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min([machine, *(limit for limit in limits if limit is not None)]))


def cpu_count() -> int:
    """CPUs that the process may keep busy: those of its affinity mask, at most its cgroups' quota, rounded up."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def cpu_quota() -> float | None:
    """CPUs' worth of time that the process' cgroups grant; None where they set no quota."""
    found = []
    for folder in _folders("cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        found.append((_as_number(quota), _as_number(period)))
        found.append((_number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")))
    shares = [quota / period for quota, period in found if quota is not None and period and quota > 0]
    return min(shares, default=None)


_V1_MEMORY = "memory.limit_in_bytes"


def _folders(controller: str) -> Iterator[Path]:
    """Folders of the process' cgroup and of all above it, in either version of the interface."""
    for line in _text(_OWN_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = _CGROUPS
        elif controller in controllers.split(","):
            root = _CGROUPS / controllers if (_CGROUPS / controllers).is_dir() else _CGROUPS / controller
        else:
            continue
        # In a container the path may name folders that only its host sees; the root is then the container's own.
        own = root / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder == root or root in folder.parents)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    return _as_number(_text(path))


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "max", or no such file
        return None


def share_cpus() -> None:
    """Set how this process' threads share its CPUs, unless the environment says; call it before torch is imported.

    Waiting threads give their CPU away. OpenMP's own default is to spin for milliseconds, and the thread that they wait
    for may be waiting for that very CPU: a training step of two threads beside a busy neighbour then takes ten times as
    long. There are as many threads as CPUs, by affinity and quota, divided by the processes that a launcher started on
    this machine.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    threads = max(1, cpu_count() // local_world_size())
    if threads < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def local_world_size() -> int:
    """Processes that torchrun, accelerate or DeepSpeed started on this machine; 1 for none of them.

    MPI's and Slurm's are bound to CPUs by their launchers, which affinity shows.
    """
    count = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(count)) if count.isdecimal() else 1


def describe_cpus(threads: int) -> str:
    """One line for people: the threads of this process, the CPUs that they share, and how they wait."""
    cpus, workers = cpu_count(), local_world_size()
    shared = f" shared by {workers} processes" if workers > 1 else ""
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" or os.environ.get("GOMP_SPINCOUNT") == "0"
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    load = f", which are busy (load {busy:.1f})" if busy > cpus else ""
    waits = "waiting threads give their CPU away" if passive else "waiting threads spin (OMP_WAIT_POLICY=passive: not)"
    return f"{threads} thread{'s' * (threads != 1)} on {cpus} CPU{'s' * (cpus != 1)}{shared}{load}; {waits}"
