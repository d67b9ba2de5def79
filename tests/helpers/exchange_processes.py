"""Run by test_exchange_processes.py in every process: random layers over gloo, against the op of one process."""

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.exchange_cases import exchanged, make_case, on_one
from toolkit.errors import ToolkitError
from toolkit.moe.dispatchers.symmetric_memory import SymmetricMemory
from toolkit.moe.dispatchers.transport import Collective, transport_of


def run(rank: int, size: int, store: str, function: Any, *arguments: Any) -> None:
    """``function(rank, size, *arguments)`` with a gloo group; for ``torch.multiprocessing.spawn``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        function(rank, size, *arguments)
    finally:
        dist.destroy_process_group()


def agree_with_one_process(rank: int, size: int, seeds: int) -> None:
    transport = transport_of(dist.group.WORLD)
    assert isinstance(transport, Collective)
    for seed in range(seeds):
        chance = random.Random(seed)
        tokens = [chance.choice([0, 1, 5, 16]) for _ in range(size)]
        dtype = chance.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
        only = chance.choice([None, None, range(2)])
        position = chance.choice(["activation", "combine", "input"])
        case = make_case(
            seed, tokens, dtype=dtype, bias=chance.choice([True, False]), only=only, score_position=position
        )
        chunks = chance.choice([1, 2, 4])
        out, gradients = exchanged(case, transport, chunks)
        again, once_more = exchanged(case, transport, chunks)
        assert torch.equal(out, again)
        assert all(torch.equal(gradients[name], once_more[name]) for name in gradients)
        assert torch.equal(out, on_one(case, dtype)[0][case.of_rank(rank)])
        limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
        for name, whole in on_one(case, torch.float64)[1].items():
            count = case.num_experts // size
            mine = slice(rank * count, (rank + 1) * count)
            expected = whole[case.of_rank(rank) if name in ("x", "topk_weights") else mine]
            error = (gradients[name].double() - expected).norm()
            assert error <= limit * whole.norm().clamp_min(1e-30), (seed, name)


def refuse_symmetric_memory(rank: int, size: int) -> None:
    group: Any = dist.group.WORLD
    with pytest.raises(ToolkitError, match="Symmetric memory needs"):
        SymmetricMemory(group, 1024)
