"""Small recipes of every kind of objective, over small tasks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.helpers.training_recipes import tiny_recipe
from toolkit.config import Recipe
from toolkit.training.loop import Trainer
from toolkit.training.tasks import Problem, Task

TASK = {"name": "countdown", "numbers": 2, "largest": 5, "target": 25}
LOWER = {"name": "tests.helpers.objective_recipes:Lower"}
WARMUP = {"max_steps": 6, "learning_rate": 1e-2, "batch_tokens": 128}


class Lower(Task):
    """Answer with bytes of the lower half: random weights have something to gain from the first step on."""

    def make(self, seed: int, count: int) -> list[Problem]:
        names = [f"{(seed + at) % 9973:x}" for at in range(count)]
        return [Problem(f"{name} :", "aaaa", "\u00e9\u00e9\u00e9", name) for name in names]

    def reward(self, prompt: str, completion: str) -> float:
        return sum(character.isascii() for character in completion) / max(len(completion), 1)


class Uneven(Lower):
    """Prompts of many lengths."""

    def make(self, seed: int, count: int) -> list[Problem]:
        problems = super().make(seed, count)
        return [replace(one, prompt="x" * ((seed + at) % 7) + one.prompt) for at, one in enumerate(problems)]


def objective_recipe(output: Path, kind: str, objective: dict[str, Any], **sections: Any) -> Recipe:
    """A recipe of a few steps; ``objective`` overrides the fields of its section."""
    common: dict[str, Any] = {
        "kind": kind,
        "task": TASK,
        "rollout": {"max_completion_length": 8, "max_num_seqs": 16},
        "evaluation": {"max_eval_samples": 16, "val_set_size": 0.2},
    }
    sections.setdefault("tokenizer", {"vocab_size": 257})
    train = {"max_steps": 4, "batch_tokens": 128, "max_length": 32, **sections.pop("train", {})}
    return tiny_recipe(
        output, run_name=sections.pop("run_name", kind), objective=common | objective, train=train, **sections
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.hf_model.state_dict().items()}


def resumed(recipe: Recipe) -> Trainer:
    """A run that is stopped in its third step, after a checkpoint of the second, and resumed."""
    parts = Trainer(recipe, quiet=True)
    while parts.step < 3:
        parts.train_step()
        parts.objective.finish()
        if parts.step == 2:
            parts.save()
    again = Trainer(recipe.model_copy(update={"resume_from_checkpoint": True}), quiet=True)
    assert again.step == 2
    again.fit()
    return again


def check_resumes(whole: Trainer, recipe: Recipe) -> Trainer:
    """The run of ``recipe`` that is stopped and resumed. Raises AssertionError unless its weights are ``whole``'s."""
    again = resumed(recipe.model_copy(update={"run_name": "again"}))
    found = weights(again)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, found[name]), name
    return again


def moved_by_training(trainer: Trainer) -> set[str]:
    """Trains to the end; the names of the tensors that are not what they were."""
    before = weights(trainer)
    trainer.fit()
    return {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}


def dense_logprobs(model: Any, sequence: list[int]) -> torch.Tensor:
    """Log-probabilities of a sequence's tokens after the first, by an ordinary forward and plain torch."""
    logits = model(torch.tensor([sequence])).logits[0, :-1] + 0.0
    return logits.log_softmax(-1).gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]
