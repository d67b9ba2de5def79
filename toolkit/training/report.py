"""What a finished run returns, writes and prints."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from toolkit.machine import describe_cpus
from toolkit.training.metrics import FILE, read_metrics
from toolkit.training.objectives.base import Objective

if TYPE_CHECKING:
    from toolkit.training.loop import Trainer


def about_model(trainer: "Trainer") -> list[str]:
    """Lines on what is trained, and on what."""
    report, trained, total = trainer.patch_report, trainer.num_trainable, trainer.num_parameters
    roles = ", ".join(f"{count} {role}" for role, count in report.roles().items())
    part = f", {trained / 1e6:.3f} M trainable" if trained != total else ""
    epochs = trainer.recipe.train.num_train_epochs
    lines = [
        f"model: {type(trainer.hf_model).__name__}, {total / 1e6:.2f} M parameters{part}",
        f"patched: {roles} (numerics: {report.numerics})",
    ]
    distributed, processes = trainer.recipe.train.distributed, trainer.accelerator.num_processes
    if processes > 1:
        lines.append(f"processes: {processes} ({distributed.strategy})")
    elif distributed.shards:
        lines.append(f"note: one process has all of the model; {distributed.strategy} needs more (--num-processes)")
    if epochs is not None:
        lines.append(f"epochs: {epochs:g} are {trainer.recipe.train.max_steps:,} steps")
    if trainer.accelerator.device.type == "cpu":
        lines.append(f"cpu: {describe_cpus(torch.get_num_threads())}")
    return lines


def result_of(trainer: "Trainer") -> dict[str, Any]:
    """What a finished run writes to ``result.json``, with the held-out measure unless the recipe turns it off.

    A metric's value is its mean over the last 20 steps that had one; NaN where none had.
    """
    lines = read_metrics(trainer.folder / FILE)[-20:]
    names = dict.fromkeys(("loss", trainer.objective.primary_metric))
    result: dict[str, Any] = {
        "run_name": trainer.recipe.run_name,
        "objective": trainer.recipe.objective.kind,
        "global_step": trainer.step,
        "num_parameters": trainer.num_parameters,
        "num_trainable_parameters": trainer.num_trainable,
        "num_tokens": trainer.num_tokens,
        "train_runtime": round(trainer.seconds, 1),
        "train_tokens_per_second": round(trainer.num_tokens / max(trainer.seconds, 1e-9), 1),
        **{name: _mean([entry[name] for entry in lines if entry[name] is not None]) for name in names},
        "numerics": str(trainer.patch_report.numerics),
        "threads": torch.get_num_threads(),
        "processes": trainer.accelerator.num_processes,
    }
    if trainer.recipe.evaluate.do_eval:
        if trainer.before_training is not None:
            result["before_training"] = trainer.before_training
        if trainer.measures.best_step is not None:
            result["best_step"] = trainer.measures.best_step
        step, measured = trainer.measured or (-1, {})
        result |= measured if step == trainer.step else trainer.evaluate()
    return result


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def show(result: dict[str, Any], objective: Objective[Any], folder: Path) -> None:
    """Print a line on the training, and the held-out measure."""
    primary = objective.primary_metric
    print(
        f"trained {result['global_step']} steps, {result['num_tokens']:,} tokens in {result['train_runtime']:.0f} s "
        f"({result['train_tokens_per_second']:,.0f} tokens/s), {primary} {result[primary]:.3f}"
    )
    if any(name.startswith("eval_") for name in result):
        objective.show(result.get("before_training"), result)
    print(f"run: {folder}", flush=True)


def line(values: dict[str, Any]) -> str:
    """Metrics as one line."""
    return ", ".join(
        f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
