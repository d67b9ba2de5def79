"""The learning rate as a function of the step."""

import math
import warnings
from typing import Any

import torch

from toolkit.config.optimization import ScheduleSection
from toolkit.errors import ToolkitError, first_line
from toolkit.sentences import shown


def learning_rate_factor(step: int, steps: int, schedule: ScheduleSection) -> float:
    """Share of ``optimizer.learning_rate`` at ``step`` (0-based) of ``steps``.

    Warm-up: (step + 1) / warmup_steps. Then, with m = min_lr_ratio: cosine_with_min_lr: m + (1 - m) (1 + cos(pi x)) / 2
    with x from 0 to 1 over the remaining steps; warmup_stable_decay: 1, then linearly to m over the last
    ``num_decay_steps``; constant_with_warmup: 1.
    """
    kind, warmup, decay, least = (
        schedule.lr_scheduler_type, schedule.num_warmup_steps(steps), schedule.num_decay_steps, schedule.min_lr_ratio,
    )  # fmt: skip
    if step < warmup:
        return (step + 1) / warmup
    if kind == "cosine_with_min_lr":
        x = min((step - warmup) / max(steps - 1 - warmup, 1), 1.0)
        return least + (1 - least) * (1 + math.cos(math.pi * x)) / 2
    if kind == "warmup_stable_decay" and decay:
        x = min(max(step + 1 - (steps - decay), 0) / decay, 1.0)
        return 1 - (1 - least) * x
    return 1.0


def make_scheduler(
    optimizer: torch.optim.Optimizer, schedule: ScheduleSection, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """``learning_rate_factor``, or a schedule of transformers, as a torch scheduler: stepped once per optimizer step.

    Raises:
        ToolkitError: settings that transformers' schedule does not have.
    """
    if schedule.of_transformers:
        from transformers import get_scheduler

        settings: dict[str, Any] = {
            name: int(value) if name == "num_cycles" and schedule.lr_scheduler_type == "cosine_with_restarts" else value
            for name, value in schedule.lr_scheduler_kwargs.items()
        }
        try:
            scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
                schedule.lr_scheduler_type, optimizer, schedule.num_warmup_steps(steps), steps, settings or None
            )
            return scheduler
        except (TypeError, ValueError) as error:
            raise ToolkitError(
                f"schedule.lr_scheduler_kwargs must be settings of '{schedule.lr_scheduler_type}', got "
                f"{shown(schedule.lr_scheduler_kwargs)} ({first_line(error)})."
            ) from None
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, schedule))


def advance(scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    """One step on, after an update, or after a step that had nothing to train on."""
    with warnings.catch_warnings():
        # torch takes a first step without updates (all groups dropped) for a wrong order of calls.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        scheduler.step()
