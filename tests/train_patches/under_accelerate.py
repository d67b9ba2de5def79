"""Run by test_distributed.py in every process that ``accelerate launch`` starts with ddp.yaml or fsdp2.yaml."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from tests.helpers.distributed_cases import (
    CASES,
    CLIP,
    RATE,
    Step,
    check_nothing_counted,
    check_rollout,
    check_training,
    finish,
    loss_of_logprobs,
    refused,
    run_example,
)
from tests.helpers.training_recipes import tiny_recipe, write_corpus
from toolkit.training.loop import Trainer
from train_patches.fsdp import gathered


def step_of(accelerator: Accelerator, wrapped: nn.Module, optimizer: Any) -> Step:
    def step(loss: Tensor) -> None:
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def prepare(accelerator: Accelerator, model: Any) -> tuple[nn.Module, Step]:
    """As accelerate does it."""
    # Of the model before, among whose parameters and layers it would look for these.
    accelerator.free_memory()
    if accelerator.is_fsdp2:
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = None
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    return wrapped, step_of(accelerator, wrapped, optimizer)


def shard(accelerator: Accelerator, head: bool, again: bool | None, model: Any) -> tuple[nn.Module, Step]:
    """As one calls ``fully_shard``. head: as a separate unit. again: whether the root is sharded after its forward."""
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    for unit in [*model.model.layers, *([model.lm_head] if head else [])]:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=again)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def step(loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def whole(model: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


def under_ddp(folder: Path, cases: str) -> None:
    assert cases == "all"
    accelerator = Accelerator()
    assert accelerator.distributed_type is DistributedType.MULTI_CPU
    for family, patched, loss_of in CASES:
        check_training(family, patched, loss_of, partial(prepare, accelerator), whole)
    check_nothing_counted(partial(prepare, accelerator), whole)
    check_rollout(partial(prepare, accelerator), whole, folder / "ddp", sharded=False)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            write_corpus(folder / "text")
    Trainer(tiny_recipe(folder, run_name="ddp", train={"max_steps": 2}), quiet=True).fit()
    run_example("accelerate and DDP", folder / "example")


def under_fsdp2(folder: Path, cases: str) -> None:
    # On a CPU accelerate leaves FSDP2 alone; told that these are GPUs it does what it does on them, through gloo.
    state = PartialState(cpu=True)
    state.distributed_type = DistributedType.MULTI_GPU
    accelerator = Accelerator()
    assert accelerator.distributed_type is DistributedType.FSDP
    assert accelerator.is_fsdp2
    ways = {"accelerate": partial(prepare, accelerator)}
    if cases == "few":
        check_training("llama", True, loss_of_logprobs, ways["accelerate"], gathered)
        check_rollout(ways["accelerate"], gathered, folder / "fsdp2", sharded=True)
        return
    ways |= {f"{h} {a}": partial(shard, accelerator, h, a) for h, a in ((False, None), (False, True), (True, True))}
    for way, wrap in ways.items():
        for family, patched, loss_of in CASES:
            if way == "accelerate" or (patched and family == "llama"):
                check_training(family, patched, loss_of, wrap, gathered)
        if way in ("accelerate", "True True"):
            check_rollout(wrap, gathered, folder / f"fsdp2 {way}", sharded=True)
    check_nothing_counted(ways["accelerate"], gathered)
    model = nn.Linear(2, 2)
    assert not isinstance(model, FSDPModule)
    refused("Linear is not sharded", lambda: gathered(model))
    run_example("FSDP2", folder / "example")
    refused("train.distributed must be 'fsdp2'", lambda: Trainer(tiny_recipe(folder, run_name="no")))


torch.set_num_threads(1)
(under_fsdp2 if "ACCELERATE_USE_FSDP" in os.environ else under_ddp)(Path(sys.argv[1]), sys.argv[2])
finish()
