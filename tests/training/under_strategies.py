"""Run by test_strategies.py in two processes: FOLDER STRATEGY CASE..., each trained, some resumed from the middle."""

import math
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.helpers.strategies import RESUMED, case
from toolkit.config.distributed import DistributedSection
from toolkit.training.loop import Trainer, train
from toolkit.training.metrics import read_metrics
from toolkit.training.signals import Interrupted

torch.set_num_threads(1)
folder, strategy = Path(sys.argv[1]), sys.argv[2]


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    found = run / "checkpoints" / f"step-{step:06d}"
    return {
        f"{path.name}/{name}": one for path in found.rglob("*.safetensors") for name, one in load_file(path).items()
    }


def check_skipped() -> None:
    """A loss that is not finite in one process: both keep weights and optimizer, and train further."""
    recipe = case("moe", folder, strategy, 2).model_copy(update={"run_name": f"skip-{strategy}"})
    trainer = Trainer(recipe, quiet=True)

    def weights() -> list[torch.Tensor]:
        with trainer.strategy.whole():
            return [one.detach().clone() for one in trainer.hf_model.parameters()]

    trainer.train_step()
    before, loss = weights(), trainer.objective.loss
    factor = math.nan if trainer.accelerator.process_index else 1.0
    trainer.objective.loss = lambda *given: loss(*given) * factor  # type: ignore[method-assign]
    trainer.train_step()
    assert not trainer.gradients.updated
    assert trainer.gradients.skipped == 1
    assert all(map(torch.equal, before, weights()))
    trainer.objective.loss = loss  # type: ignore[method-assign]
    trainer.train_step()
    assert trainer.gradients.updated
    assert not all(map(torch.equal, before, weights()))


def check_stopped_rollout() -> None:
    """A signal that one process of a split model gets, which no other one sees: all stop at the same token."""
    recipe = case("grpo", folder, strategy, 2).model_copy(update={"run_name": f"stop-{strategy}"})
    trainer = Trainer(recipe, quiet=True)
    if trainer.accelerator.process_index:
        trainer.stop.accept(signal.SIGTERM)
    try:
        trainer.train_step()
    except Interrupted:
        trainer.objective.close()
        return
    raise AssertionError("the rollout went on")


if strategy == "tp" and "grpo" in sys.argv[3:]:
    check_stopped_rollout()
if "moe" in sys.argv[3:]:
    check_skipped()
for name in sys.argv[3:]:
    recipe = case(name, folder, strategy, 2)
    result = train(recipe, quiet=True)
    assert result["processes"] == 2
    if name not in RESUMED:
        continue
    run, last = Path(recipe.output_dir) / recipe.run_name, recipe.train.max_steps
    losses, saved = [line["loss"] for line in read_metrics(run / "metrics.jsonl")], tensors(run, last)
    torch.distributed.barrier()  # both have read before the resumed run removes it
    resumed = recipe.model_copy(update={"resume_from_checkpoint": f"step-{last // 2}"})
    train(resumed, quiet=True)
    torch.distributed.barrier()
    assert [line["loss"] for line in read_metrics(run / "metrics.jsonl")] == losses, name
    again = tensors(run, last)
    assert again.keys() == saved.keys()
    for key, one in saved.items():
        assert torch.equal(one, again[key]), f"{name}: {key}"
    if name == "dense":
        other = DistributedSection(strategy="fsdp2" if strategy == "ddp" else "ddp")
        moved = resumed.model_copy(update={"train": recipe.train.model_copy(update={"distributed": other})})
        train(moved, quiet=True)
        moved_losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
        assert len(moved_losses) == len(losses)
        assert max(abs(a - b) for a, b in zip(moved_losses, losses)) <= 1e-5
        torch.distributed.barrier()
print("all held", flush=True)
os._exit(0)  # a thread of gloo may abort a Python that ends
