"""Runs inside of a run: the supervised warm-up of a model, and the training of a teacher."""

from pathlib import Path
from typing import Any

from toolkit.config import Recipe, validate
from toolkit.config.objective import PretrainObjective
from toolkit.config.schema import MoeSection
from toolkit.training.resume import run_folder


def warmup_recipe(recipe: Recipe) -> Recipe | None:
    """The supervised run that ``objective.warmup`` asks for, in the folder ``warmup`` of the run; None without one."""
    objective = recipe.objective
    if isinstance(objective, PretrainObjective) or objective.warmup is None:
        return None
    warmup = objective.warmup
    task = warmup.task if warmup.task is not None else objective.task
    return _supervised(recipe, "warmup", task, warmup.steps, warmup.lr, warmup.batch_tokens, {})


def teacher_recipe(recipe: Recipe, tokenizer: Path) -> Recipe:
    """The supervised run of the teacher that ``objective.teacher`` describes, with a tokenizer that is there."""
    objective: Any = recipe.objective
    teacher = objective.teacher
    model = {"model": {**recipe.model.model_dump(), "path": None, "config": teacher.config, "lora": None}}
    # The section is about the student's experts; a teacher may have none.
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"moe": MoeSection()})})
    changed = model | {"tokenizer": {"path": str(tokenizer)}}
    return _supervised(recipe, "teacher", objective.task, teacher.steps, teacher.lr, teacher.batch_tokens, changed)


def _supervised(
    recipe: Recipe, name: str, task: Any, steps: int, lr: float, batch_tokens: int, changed: dict[str, Any]
) -> Recipe:
    values = recipe.model_dump()
    values["model"]["lora"] = None
    objective = {key: values["objective"][key] for key in ("evaluation", "rollout")}
    return validate(
        {
            **values,
            "name": name,
            "output": str(run_folder(recipe)),
            "resume": "never" if recipe.resume == "never" else "auto",
            "objective": {"kind": "sft", "task": task, **objective},
            "optimizer": {**values["optimizer"], "lr": lr},
            "schedule": {"kind": "cosine", "warmup": min(20, steps), "floor": 0.1},
            "train": {**values["train"], "steps": steps, "batch_tokens": batch_tokens, "accumulate": 1},
            "checkpoint": {**values["checkpoint"], "keep": 1},
            "evaluate": {"enabled": False},
            **changed,
        }
    )
