"""The held-out measure of a run between its steps, and what the recipe does with the best one."""

from typing import TYPE_CHECKING, Any

from toolkit.loading.run import name_of, steps_in
from toolkit.training import checkpoint
from toolkit.training.model import load_weights_of
from toolkit.training.report import line
from toolkit.training.state import rng_kept

if TYPE_CHECKING:
    from toolkit.training.loop import Trainer


def measure(trainer: "Trainer") -> tuple[dict[str, Any], bool]:
    """The held-out measure after the run's step, and whether it is the best one. All processes must call it."""
    with rng_kept():
        measured = trainer.evaluate()
    trainer.measured = trainer.step, measured
    trainer.log(f"held out, step {trainer.step}: {line(measured)}")
    return measured, trainer.measures.add(trainer.step, measured)


def name_best(trainer: "Trainer") -> None:
    """Let the run be opened by the checkpoint of its best measure, where the recipe asks for that."""
    step, folder = _best(trainer), trainer.folder / "checkpoints"
    if step is not None and trainer.accelerator.is_main_process:
        checkpoint.name_best(folder, step)


def load_best(trainer: "Trainer") -> None:
    """Give the run's model the weights of the best measure, where the recipe asks for that."""
    step, folder = _best(trainer), trainer.folder / "checkpoints"
    if step is not None and step != trainer.step:
        trainer.log(f"the best: {trainer.measures.describe()}")
        trainer.measured = None
        with trainer.strategy.rewritten():
            load_weights_of(trainer.hf_model, folder / name_of(step), trainer.recipe, trainer.objective.head)


def _best(trainer: "Trainer") -> int | None:
    """The step of the best measure, where the recipe asks for it and its checkpoint is there."""
    step = trainer.measures.best_step
    wanted = trainer.recipe.evaluate.load_best_model_at_end and step in steps_in(trainer.folder / "checkpoints")
    return step if wanted else None
