"""Experts sharded over real processes, which communicate over gloo."""

import inspect
from pathlib import Path

import pytest
import torch.multiprocessing as multiprocessing

from tests.helpers.exchange_processes import agree_with_one_process, refuse_symmetric_memory, run


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.sweep)])
def test_processes_agree_with_one(tmp_path: Path, size: int) -> None:
    multiprocessing.spawn(run, (size, str(tmp_path / "store"), agree_with_one_process, 8), size)


def test_symmetric_memory_is_refused_where_it_cannot_work(tmp_path: Path) -> None:
    multiprocessing.spawn(run, (1, str(tmp_path / "store"), refuse_symmetric_memory), 1)


def test_symmetric_memory_has_the_parts_that_its_transport_takes() -> None:
    """Names and signatures alone: what runs needs two GPUs."""
    from torch._C._distributed_c10d import _SymmetricMemory
    from torch.distributed import _symmetric_memory as symmetric

    assert list(inspect.signature(symmetric.rendezvous).parameters) == ["tensor", "group"]
    assert {"size", "dtype", "device"} <= set(inspect.signature(symmetric.empty).parameters)
    buffer = str(_SymmetricMemory.get_buffer.__doc__)
    assert [buffer.index(name) for name in ("rank:", "sizes:", "dtype:", "storage_offset:")] == sorted(
        buffer.index(name) for name in ("rank:", "sizes:", "dtype:", "storage_offset:")
    )
    assert "channel:" in str(_SymmetricMemory.barrier.__doc__)
