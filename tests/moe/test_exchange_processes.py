"""Experts shared out to real processes, which talk over gloo."""

from pathlib import Path

import pytest
import torch.multiprocessing as multiprocessing
from exchange_processes import agree_with_one_process, run


@pytest.mark.parametrize("size", [2, 4])
def test_processes_agree_with_one(tmp_path: Path, size: int) -> None:
    multiprocessing.spawn(run, (size, str(tmp_path / "store"), agree_with_one_process, 8), size)
