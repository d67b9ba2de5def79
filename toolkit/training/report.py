"""What a finished run prints."""

from pathlib import Path
from typing import Any

from toolkit.training.objectives.base import Objective


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
