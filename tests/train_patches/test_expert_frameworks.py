"""Experts sharded under other people's loops train as one process of plain torch does, clipping included."""

from pathlib import Path

import pytest
import torch.multiprocessing as multiprocessing

from tests.helpers.expert_frameworks import under_accelerate, under_deepspeed

SIZES = [(2, 2), pytest.param(4, 2, marks=pytest.mark.sweep)]


@pytest.mark.parametrize(("size", "experts"), SIZES)
def test_accelerate(tmp_path: Path, size: int, experts: int) -> None:
    multiprocessing.spawn(under_accelerate, (size, str(tmp_path), experts), size)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.sweep), 2])
@pytest.mark.parametrize(("size", "experts"), SIZES)
def test_deepspeed(tmp_path: Path, size: int, experts: int, stage: int) -> None:
    pytest.importorskip("deepspeed")
    multiprocessing.spawn(under_deepspeed, (size, str(tmp_path), experts, stage), size)
