"""The learning rate as a function of the step."""

import math

import torch

from toolkit.config.schema import OptimizerSection, ScheduleSection
from toolkit.training.precision import LowPrecisionAdamW, Masters


def learning_rate_factor(step: int, steps: int, schedule: ScheduleSection) -> float:
    """Share of ``optimizer.learning_rate`` at ``step`` (0-based) of ``steps``.

    Warm-up: (step + 1) / warmup_steps. Then, with m = min_lr_ratio: cosine_with_min_lr: m + (1 - m) (1 + cos(pi x)) / 2
    with x from 0 to 1 over the remaining steps; warmup_stable_decay: 1, then linearly to m over the last
    ``num_decay_steps``; constant_with_warmup: 1.
    """
    kind, warmup, decay, least = (
        schedule.lr_scheduler_type, schedule.warmup_steps, schedule.num_decay_steps, schedule.min_lr_ratio,
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


def make_optimizer(
    model: torch.nn.Module, section: OptimizerSection, masters: Masters | None = None, seed: int = 0
) -> torch.optim.Optimizer:
    """AdamW over the model's parameters: matrices decay, vectors do not. Fused where torch has it.

    Args:
        masters: with mixed precision, of parameters that were rounded to 16 bits, their values in float32. None: 16-bit
            weights are trained as the section says.
        seed: of stochastic rounding.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = section.adam_beta1, section.adam_beta2
    low = masters is not None or any(parameter.itemsize == 2 for parameter in trained)
    if low or section.optim == "adamw_8bit":
        keep = "master" if masters is not None else section.kept_of_rounding
        return LowPrecisionAdamW(
            groups, lr=section.learning_rate, betas=betas, eps=section.adam_epsilon, keep=keep, masters=masters,
            seed=seed, optim=section.optim,
        )  # fmt: skip
    return torch.optim.AdamW(
        groups,
        lr=section.learning_rate,
        betas=betas,
        eps=section.adam_epsilon,
        fused=all(parameter.device.type in ("cpu", "cuda") for parameter in trained),
    )


def make_scheduler(
    optimizer: torch.optim.Optimizer, schedule: ScheduleSection, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """``learning_rate_factor`` as a torch scheduler, to be stepped once per optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, schedule))
