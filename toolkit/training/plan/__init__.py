"""What a recipe will take, before anything is loaded: ``toolkit train --plan RECIPE``.

``model``  the model on the meta device, and the sizes of its layers
``memory`` weights, gradients, optimizer, activations of one forward, state of the engine
``work``   tokens and floating point operations of a step, and how long this machine takes for them
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.config import Recipe
from toolkit.training.plan.memory import Footprint, memory_of
from toolkit.training.plan.model import LayerSizes, empty_model
from toolkit.training.plan.work import Speed, Work, measure_speed, work_of

__all__ = ["Plan", "Speed", "describe", "make_plan", "plan_here"]

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass(frozen=True)
class Plan:
    """What a recipe will take.

    Args:
        model_class: of transformers.
        parameters: of the model, adapters included.
        trainable: of them.
        processes: that share a step.
        max_steps: None where the number follows from the data.
        work: of a step of one process.
        memory: of one process.
        seconds: that a step takes on this machine, at best and at worst; None where its speed was not measured.
        program: bytes of Python and its libraries beside ``memory``; None where they were not measured.
    """

    model_class: str
    parameters: int
    trainable: int
    processes: int
    max_steps: int | None
    work: Work
    memory: Footprint
    seconds: tuple[float, float] | None
    program: int | None = None


def make_plan(recipe: Recipe, speed: Speed | None = None, processes: int | None = None) -> Plan:
    """The plan of a recipe. Reads the model's configuration, neither its weights nor data.

    Args:
        speed: of this machine; None to leave the time out.
        processes: that share a step; None for those that a launcher started.

    Raises:
        ToolkitError: a model without a configuration, or one that transformers does not take.
    """
    model = empty_model(recipe)
    return _planned(recipe, model, LayerSizes.of(model), speed, processes)


def plan_here(recipe: Recipe, processes: int | None = None) -> Plan:
    """The plan of a recipe with the time that this machine takes, whose speed is measured for less than a second."""
    model = empty_model(recipe)
    sizes = LayerSizes.of(model)
    return replace(_planned(recipe, model, sizes, measure_speed(recipe, sizes), processes), program=_resident())


def _resident() -> int | None:
    """Bytes that this process, whose model has no weights, holds; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _planned(recipe: Recipe, model: Any, sizes: LayerSizes, speed: Speed | None, processes: int | None) -> Plan:
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    work = work_of(recipe, sizes, processes)
    parameters = list(model.parameters())
    return Plan(
        model_class=type(model).__name__,
        parameters=sum(one.numel() for one in parameters),
        trainable=sum(one.numel() for one in parameters if one.requires_grad),
        processes=processes,
        max_steps=recipe.train.max_steps if recipe.train.num_train_epochs is None else None,
        work=work,
        memory=memory_of(recipe, model, sizes, processes),
        seconds=None if speed is None else work.seconds(speed),
    )


def describe(plan: Plan) -> str:
    """The plan as lines."""
    work, memory = plan.work, plan.memory
    trained = "" if plan.trainable == plan.parameters else f", {plan.trainable / 1e6:.3f} M trainable"
    at_most = "at most " if work.at_most else ""
    processes = f" in each of {plan.processes} processes" if plan.processes > 1 else ""
    lines = [
        f"model: {plan.model_class}, {plan.parameters / 1e6:.2f} M parameters{trained}",
        f"a step: {at_most}{work.trained_tokens:,} tokens trained{processes}: {work.how}",
    ]
    if work.rolled_tokens:
        lines.append(f"        {at_most}{work.rolled_tokens:,} tokens rolled out before them")
    lines.append(f"memory{' of a process' if plan.processes > 1 else ''}: about {_bytes(memory.total)}")
    if plan.program is not None:
        lines[-1] += f", beside {_bytes(plan.program)} of Python and its libraries"
    lines += [f"  {name:<12} {_bytes(size):>10}  {about}" for name, size, about in memory.rows if size]
    if plan.seconds is not None:
        best, worst = plan.seconds
        of_run = ""
        if plan.max_steps:
            whole = " to ".join(_clock(one * plan.max_steps) for one in plan.seconds)
            of_run = f", {whole} for {plan.max_steps:,} steps"
        lines.append(f"time: {best:.2g} to {worst:.2g} s a step on this machine{of_run}, without evaluation")
    else:
        lines.append("time: not measured")
    if plan.max_steps is None:
        lines.append("steps: as many as train.num_train_epochs takes; lines are counted when the run begins")
    return "\n".join(lines)


def _bytes(size: int) -> str:
    unit, name = next(((unit, name) for unit, name in _UNITS if size >= unit), (1, "B"))
    return f"{size / unit:.1f} {name}"


def _clock(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
