"""What a finished run says about itself: figures for result.json, and the same on the terminal."""

from typing import TYPE_CHECKING, Any

import torch

from toolkit.training.metrics import FILE as METRICS
from toolkit.training.metrics import read_metrics

if TYPE_CHECKING:
    from toolkit.training.loop import Trainer


def figures(trainer: "Trainer") -> dict[str, Any]:
    """Figures of the finished run; with the held-out measure unless the recipe turns it off."""
    lines = read_metrics(trainer.folder / METRICS)[-20:]
    headline = trainer.objective.headline
    result: dict[str, Any] = {
        "name": trainer.recipe.name,
        "objective": trainer.recipe.objective.kind,
        "steps": trainer.step,
        "parameters": trainer.parameters,
        "trained_parameters": trainer.trained,
        "tokens": trainer.tokens,
        "seconds": round(trainer.seconds, 1),
        "tokens_per_second": round(trainer.tokens / max(trainer.seconds, 1e-9), 1),
        **{name: sum(line[name] for line in lines) / max(len(lines), 1) for name in dict.fromkeys(("loss", headline))},
        "numerics": str(trainer.patch_report.numerics),
        "threads": torch.get_num_threads(),
        "processes": trainer.accelerator.num_processes,
    }
    if trainer.recipe.evaluate.enabled:
        if trainer.before is not None:
            result["held_out_before"] = trainer.before
        result["held_out"] = trainer.evaluate()
    return result


def show(trainer: "Trainer", result: dict[str, Any]) -> None:
    """Print the figures: a line on the training, and the held-out measure."""
    headline = trainer.objective.headline
    print(
        f"trained {result['steps']} steps, {result['tokens']:,} tokens in {result['seconds']:.0f} s "
        f"({result['tokens_per_second']:,.0f} tokens/s), {headline} {result[headline]:.3f}"
    )
    if "held_out" in result:
        trainer.objective.show(result.get("held_out_before"), result["held_out"])
    print(f"run: {trainer.folder}", flush=True)
