"""Runs of the recipes in tests/recipes, each in a process that is forked from one that has imported everything.

A phase writes what the test reads to ``<recipe>-<phase>.json`` in the working folder.
"""

import json
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# What the forked processes need is imported here, once, by the server that forks them.
from tests.helpers import trl_trainers
from toolkit.config import Recipe, load_recipe
from toolkit.training.loop import Trainer, train
from toolkit.training.metrics import FILE, read_metrics
from toolkit.training.objectives.distillation import WithTeacher
from toolkit.training.objectives.offline import OfflineObjective
from toolkit.training.objectives.on_policy import OnPolicyObjective

RECIPES = Path(__file__).parents[1] / "recipes"
KILLED_BEFORE = 7
"""The step before which a run is killed; checkpoints are of steps 4 and 8."""


def in_process(phase: str, name: str, folder: Path, seconds: float = 120.0) -> int:
    """The exit status of a phase: negative for a signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.recipe_runs"])
    process = context.Process(target=_run, args=(phase, name, folder))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"{phase} of {name} took more than {seconds} s")
    return process.exitcode


def _run(phase: str, name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    found = {"whole": _whole, "killed": _killed, "resumed": _resumed, "trl": trl_trainers.losses}[phase](name)
    (folder / f"{name}-{phase}.json").write_text(json.dumps(found))


VARIANTS = {
    "entropy": [
        "objective.entropy_coef=0.05", "objective.top_entropy_quantile=0.4", "objective.rollout.temperature=0.7",
        "objective.beta=0.1",
    ],
    "adaptive": [
        "objective.use_adaptive_entropy=true", "objective.entropy_coef=0.02", "objective.entropy_target=3.0",
        "objective.entropy_coef_delta=0.01", "objective.beta=0.1", "objective.use_bias_correction_kl=true",
        "objective.sync_ref_model=true", "objective.ref_model_sync_steps=2", "objective.ref_model_mixup_alpha=0.6",
    ],
}  # fmt: skip
"""Of grpo, beside its recipe: ``grpo+entropy`` is one."""


def recipe_of(name: str, overrides: Sequence[str] = ()) -> Recipe:
    base, _, variant = name.partition("+")
    short = ["train.max_steps=4", "train.batch_tokens=16384"] if variant else []
    return load_recipe(str(RECIPES / f"{base}.yaml"), [*VARIANTS.get(variant, ()), *short, *overrides])


def _whole(name: str) -> dict[str, Any]:
    """Trains without a break; the data in the order in which it was trained on, for TRL's trainer."""
    trainer = Trainer(recipe_of(name, ["run_name=whole"]), quiet=True)
    trl_trainers.write_start(trainer, Path("start"))
    completions, prompts, order, targets = None, None, None, None
    if isinstance(trainer.objective, WithTeacher):
        targets = _recorded_targets(trainer)
    elif isinstance(trainer.objective, OnPolicyObjective):
        completions = _recorded(trainer)
    if isinstance(trainer.objective, OnPolicyObjective):
        count = trainer.recipe.train.max_steps * trainer.objective.section.prompts
        prompts = [line.value for line in trainer.objective.prompts.stream().take(count)]
    if isinstance(trainer.objective, OfflineObjective):
        train_section, steps = trainer.recipe.train, trainer.recipe.train.max_steps
        each = train_section.per_device_train_batch_size
        count = trainer.objective.lines_per_step if each is None else each * train_section.gradient_accumulation_steps
        order = [line.value for line in trainer.objective.sources(trainer.objective.context).take(steps * count)]
    trainer.fit()
    result = {"before": trainer.before_training, "after": trainer.evaluate()}
    trainer.objective.close()
    return {
        **result,
        **_of_run("whole"),
        "order": order,
        "completions": completions,
        "prompts": prompts,
        "targets": targets,
    }


def _recorded_targets(trainer: Trainer) -> list[Any]:
    """Fills with (whether the student has sampled them, completions) of each step, as token ids."""
    objective: Any = trainer.objective
    step_targets, found = objective.step_targets, []

    def record(step: int) -> Any:
        targets = step_targets(step)
        on_policy = getattr(objective, "on_policy", lambda _: True)(step)
        found.append((on_policy, [(one.prompt, one.completion) for one in targets]))
        return targets

    objective.step_targets = record
    return found


def _recorded(trainer: Trainer) -> list[Any]:
    """Fills with (prompt, completions) of each group that is rolled out for training, as token ids."""
    objective: Any = trainer.objective
    generate, found = objective.rollout.generate, []

    def record(prompts: Any, seeds: Any, n: int = 1, temperature: float | None = None) -> Any:
        groups = generate(prompts, seeds, n, temperature)
        if n > 1:
            found.append([(prompt, [one.token_ids for one in group]) for prompt, group in zip(prompts, groups)])
        return groups

    objective.rollout.generate = record
    return found


def _killed(name: str) -> None:
    """Trains, and is killed as nothing can be caught, between two checkpoints."""
    trainer = Trainer(recipe_of(name, ["run_name=parts"]), quiet=True)
    step = trainer.train_step

    def train_step() -> Any:
        if trainer.step == KILLED_BEFORE:
            os.kill(os.getpid(), signal.SIGKILL)
        return step()

    trainer.train_step = train_step  # type: ignore[method-assign]
    trainer.fit()


def _resumed(name: str) -> dict[str, Any]:
    train(recipe_of(name, ["run_name=parts", "resume_from_checkpoint=true"]), quiet=True)
    return _of_run("parts")


def _of_run(run_name: str) -> dict[str, Any]:
    lines = read_metrics(Path("runs") / run_name / FILE)
    return {"losses": [line["loss"] for line in lines], "norms": [line["grad_norm"] for line in lines]}
