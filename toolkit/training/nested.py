"""Recipes of the runs inside of a run: the SFT warm-up of a model, and the training of a teacher."""

from pathlib import Path
from typing import Any

from toolkit.config import Recipe, validate
from toolkit.config.objective import PromptSection
from toolkit.config.schema import MoeSection
from toolkit.training.resume import run_folder


def warmup_recipe(recipe: Recipe) -> Recipe | None:
    """The SFT run that ``objective.warmup`` asks for, in the folder ``warmup`` of the run; None without one."""
    objective = recipe.objective
    if not isinstance(objective, PromptSection) or objective.warmup is None:
        return None
    warmup = objective.warmup
    task = warmup.task if warmup.task is not None else objective.task
    return _sft(recipe, "warmup", task, warmup.max_steps, warmup.learning_rate, warmup.batch_tokens, {})


def teacher_recipe(recipe: Recipe, tokenizer: Path) -> Recipe:
    """The SFT run of the teacher that ``objective.teacher`` describes, with the tokenizer in a folder."""
    objective: Any = recipe.objective
    teacher = objective.teacher
    model = {
        **recipe.model.model_dump(),
        "name_or_path": None,
        "config": teacher.config,
        "lora": None,
        "quantise": None,
    }
    model |= {"freeze_parameters": None, "trainable_parameters": None}
    # These are about the student's experts and indexers; a teacher may have none.
    own = {"moe": MoeSection(), "indexer_loss_coef": 0.0}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=own)})
    changed = {"model": model, "tokenizer": {"name_or_path": str(tokenizer)}}
    return _sft(
        recipe, "teacher", objective.task, teacher.max_steps, teacher.learning_rate, teacher.batch_tokens, changed
    )


def _sft(
    recipe: Recipe, name: str, task: Any, steps: int, rate: float, batch_tokens: int, changed: dict[str, Any]
) -> Recipe:
    values = recipe.model_dump()
    values["model"] |= {"lora": None, "quantise": None}
    objective = {key: values["objective"][key] for key in ("evaluation", "rollout")}
    train = {
        "max_steps": steps,
        "batch_tokens": batch_tokens,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": None,
    }
    return validate(
        {
            **values,
            "run_name": name,
            "output_dir": str(run_folder(recipe)),
            "resume_from_checkpoint": recipe.resume_from_checkpoint is not False,
            "objective": {"kind": "sft", "task": task, **objective},
            "optimizer": {**values["optimizer"], "learning_rate": rate},
            "schedule": {
                "lr_scheduler_type": "cosine_with_min_lr",
                "warmup_steps": min(20, steps),
                "min_lr_ratio": 0.1,
            },
            "train": {**values["train"], **train},
            "checkpoint": {**values["checkpoint"], "save_total_limit": 1},
            "evaluate": {"do_eval": False},
            "export": [],
            **changed,
        }
    )
