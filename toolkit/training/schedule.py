"""The learning rate as a function of the step."""

import math

import torch

from toolkit.config.schema import OptimizerSection, ScheduleSection


def learning_rate_factor(step: int, steps: int, schedule: ScheduleSection) -> float:
    """Share of ``optimizer.lr`` at ``step`` (0-based) of ``steps``.

    Warm-up: (step + 1) / warmup. Then cosine: floor + (1 - floor) * (1 + cos(pi * x)) / 2 with x from 0 to 1
    over the remaining steps; wsd: 1, then linearly to ``floor`` over the last ``decay`` steps; constant: 1.
    """
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.kind == "cosine":
        x = min((step - schedule.warmup) / max(steps - 1 - schedule.warmup, 1), 1.0)
        return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * x)) / 2
    if schedule.kind == "wsd" and schedule.decay:
        x = min(max(step + 1 - (steps - schedule.decay), 0) / schedule.decay, 1.0)
        return 1 - (1 - schedule.floor) * x
    return 1.0


def make_optimizer(model: torch.nn.Module, section: OptimizerSection) -> torch.optim.AdamW:
    """AdamW over the model's parameters: matrices decay, vectors do not. Fused where torch has it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    first, second = section.betas
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.lr,
        betas=(first, second),
        eps=section.eps,
        fused=all(parameter.device.type in ("cpu", "cuda") for parameter in trained),
    )


def make_scheduler(
    optimizer: torch.optim.Optimizer, schedule: ScheduleSection, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """``learning_rate_factor`` as a torch scheduler, to be stepped once an optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, schedule))
