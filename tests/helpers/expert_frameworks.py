"""Run by test_expert_frameworks.py in every process: the small MoE model under accelerate and DeepSpeed."""

import gc
import os
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.small_moe_model import STEPS, loss_of, small_model, train_alone

CLIP = 0.05  # far below the norms, so that every step is clipped


def start(rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    port = 20000 + zlib.crc32(store.encode()) % 12000  # of the whole path, which no other run has
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip


def compare(losses: list[Tensor], weights: dict[str, Tensor], size: int) -> None:
    """The mean loss of every step and the weights after the last, against one process of plain torch."""
    expected, plain = train_alone(CLIP)
    for loss, value in zip(losses, expected, strict=True):
        dist.all_reduce(loss)
        assert abs(loss.item() / size - value) <= 1e-5
    assert weights.keys() == plain.keys()
    for name, tensor in plain.items():
        assert (weights[name] - tensor).abs().max() <= 1e-4, name


def under_accelerate(rank: int, size: int, store: str, experts: int) -> None:
    from accelerate import Accelerator

    from toolkit.moe.sharded_parameters import gather_state_dict
    from train_patches.accelerate import expert_parallel

    start(rank, size, store)
    accelerator = Accelerator()
    model = small_model()
    sharded = expert_parallel(accelerator, model, size=experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.01)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(STEPS):
        loss = loss_of(wrapped, step, rank, size)
        losses.append(loss.detach().clone())
        optimizer.zero_grad()
        accelerator.backward(loss)
        sharded.reduce()
        sharded.clip(wrapped.parameters(), CLIP)
        optimizer.step()
    compare(losses, gather_state_dict(model, sharded), size)
    # DDP's reducer goes while the group lives: as the group's last owner it would wait, holding the interpreter's lock,
    # for a thread of gloo that waits for that lock.
    del wrapped, optimizer, loss
    accelerator.free_memory()
    gc.collect()
    dist.destroy_process_group()


def under_deepspeed(rank: int, size: int, store: str, experts: int, stage: int) -> None:
    import deepspeed

    from train_patches.deepspeed import expert_parallel, gather_state_dict, parameter_groups

    start(rank, size, store)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first; gloo does not need it
    deepspeed.init_distributed("gloo")
    model = small_model()
    sharded = expert_parallel(model, size=experts)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=3e-2, weight_decay=0.01)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for step in range(STEPS):
        loss = loss_of(engine, step, rank, size)
        losses.append(loss.detach().clone())
        engine.backward(loss)
        engine.step()
    assert engine.has_moe_layers
    compare(losses, gather_state_dict(model, sharded), size)
    dist.destroy_process_group()
