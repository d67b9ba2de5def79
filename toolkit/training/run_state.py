"""What a checkpoint of a run holds, and a run that continues from one."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.config import dump
from toolkit.loading import add_files
from toolkit.training.averaging import save_averages
from toolkit.training.model import save_model
from toolkit.training.resume import AVERAGED, Start
from toolkit.training.state import OptimizerState, restore_rank, write_state

if TYPE_CHECKING:
    from toolkit.training.loop import Trainer

OWN_TENSORS = "objective.safetensors"
"""Of an objective."""


def write_run(
    trainer: "Trainer",
    staging: Path,
    rngs: list[Any],
    positions: list[Any],
    optimizer: OptimizerState,
    averages: dict[str, Tensor] | None,
) -> None:
    """Fill the folder of a checkpoint, on the main process, which has the whole model.

    Args:
        rngs: ``rng_state`` of each process.
        positions: position in the data of each process.
        optimizer: its whole state.
        averages: of the weights, whole; None where the run keeps none.
    """
    save_model(trainer.hf_model, staging, trainer.recipe.model)
    trainer.tokenizer.save_pretrained(str(staging))
    add_files(trainer.processor_files, staging)
    (staging / "recipe.yaml").write_text(dump(trainer.recipe), encoding="utf-8")
    values = {
        "step": trainer.step,
        "seconds": trainer.seconds,
        "num_tokens": trainer.num_tokens,
        "before_training": trainer.before_training,
        "measures": trainer.measures.state_dict(),
        "world_size": trainer.objective.context.world_size,
        "threads": torch.get_num_threads(),
        "data_fingerprint": trainer.objective.fingerprint,
        "scheduler": trainer.scheduler.state_dict(),
        "gradients": trainer.gradients.state_dict(),
        "data": positions,
    }
    write_state(staging / "training", values, optimizer, rngs)
    if averages is not None:
        save_averages(averages, staging / "training")
    if own := trainer.objective.tensors():
        save_file({name: one.cpu().contiguous() for name, one in own.items()}, str(staging / "training" / OWN_TENSORS))


def write_averaged(trainer: "Trainer") -> None:
    """Leave the averaged weights as a model in ``ema`` of the run's folder, where the recipe keeps them.

    All processes must call it; the main one writes.
    """
    if trainer.averaged is None:
        return
    with trainer.averaged.applied(), trainer.strategy.whole():
        if not trainer.accelerator.is_main_process:
            return
        folder = trainer.folder / AVERAGED
        shutil.rmtree(folder, ignore_errors=True)
        save_model(trainer.hf_model, folder, trainer.recipe.model)
        trainer.tokenizer.save_pretrained(str(folder))
        add_files(trainer.processor_files, folder)


def restore_run(trainer: "Trainer", start: Start) -> None:
    """Continue where the checkpoint was written: optimizer, schedule, data and generators of this process."""
    state, folder = start.state, start.checkpoint / "training"
    rank = trainer.objective.context.rank
    trainer.strategy.load_optimizer(folder / "optimizer.safetensors", state["optimizer"])
    if trainer.averaged is not None:
        trainer.averaged.load(folder)
    if (folder / OWN_TENSORS).is_file():
        trainer.objective.load_tensors(load_file(str(folder / OWN_TENSORS)))
    trainer.gradients.load_state_dict(state["gradients"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    before, now = state["world_size"], trainer.objective.context.world_size
    if before == now:
        trainer.objective.load_state_dict(state["data"][rank])
    else:
        trainer.objective.follow(state["data"])
    if rank < before:
        restore_rank(folder, state, rank)
    trainer.step, trainer.seconds, trainer.num_tokens = start.step, state["seconds"], state["num_tokens"]
    trainer.before_training = state["before_training"]
    trainer.measures.load_state_dict(state["measures"])
    trainer.log(f"resumed from {start.checkpoint}")
    if before != now:
        trainer.log(f"note: {before} processes wrote it, {now} resume it; a step has the examples of {now}")
    if state["threads"] != torch.get_num_threads():
        trainer.log(
            f"note: {state['threads']} threads wrote it, {torch.get_num_threads()} resume it; bits may differ from "
            "the uninterrupted run's"
        )
