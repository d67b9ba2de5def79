"""Run by test_distributed.py in every process that ``deepspeed`` starts: ZeRO-1, 2 and 3 with offload to the CPU."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

import toolkit
from tests.helpers.distributed_cases import (
    CASES,
    CLIP,
    RATE,
    STEPS,
    TOLERANCE,
    Step,
    check_nothing_counted,
    check_rollout,
    check_training,
    check_weights,
    finish,
    loss_of_logits,
    refused,
    run_example,
    small_model,
    train,
    train_alone,
)
from train_patches.deepspeed import gathered

RECIPES = Path(__file__).parents[2] / "recipes" / "distributed"


def settings(stage: int) -> dict[str, Any]:
    config = json.loads((RECIPES / f"zero{stage}.json").read_text())
    config["optimizer"]["params"]["lr"] = RATE
    assert config["gradient_clipping"] == CLIP
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # even the smallest are partitioned
    return config


def loaded_in_parts(model: Any, saved: Path) -> Any:
    """The same model as transformers loads it under ZeRO-3, where no process ever holds all of it; patched then."""
    if dist.get_rank() == 0:
        model.save_pretrained(saved)
    dist.barrier()
    using = HfDeepSpeedConfig(settings(3))
    parts = type(model).from_pretrained(saved).train()
    del using
    refused("must be gathered for patching", lambda: toolkit.patch(parts))
    with gathered(parts):
        report = toolkit.patch(parts)
    assert report.roles() == toolkit.patch(model).roles()
    return parts


def prepare(stage: int, model: Any) -> tuple[nn.Module, Step]:
    engine, *_ = deepspeed.initialize(model=model, config=settings(stage), model_parameters=model.parameters())
    assert engine.zero_optimization_stage() == stage

    def step(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return engine, step


torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first; gloo does not need it
deepspeed.init_distributed("gloo")
folder = Path(sys.argv[1])
assert sys.argv[2].endswith("zero3.json")
for stage in (1, 2, 3):
    for family, patched, loss_of in CASES if stage == 3 else CASES[:3]:
        check_training(family, patched, loss_of, partial(prepare, stage), gathered)
check_nothing_counted(partial(prepare, 3), gathered)
parts = loaded_in_parts(small_model("llama"), folder / "whole")
wrapped, step = prepare(3, parts)
losses, (expected, weights) = train(wrapped, loss_of_logits, step, range(STEPS)), train_alone("llama")
assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= TOLERANCE
with gathered(wrapped):
    check_weights(parts.state_dict(), weights[-1], "loaded in parts")
check_rollout(partial(prepare, 3), gathered, folder / "zero3", sharded=True)
check_rollout(partial(prepare, 2), gathered, folder / "zero2", sharded=False)
run_example("DeepSpeed", folder / "example")
finish()
