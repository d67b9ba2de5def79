"""Reward models: the loss by its definition and transformers' forward, adapters, what the checkpoint opens as."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.objective_recipes import LOWER, check_resumes, moved_by_training, objective_recipe
from toolkit.engine.pooling import PoolingEngine, PoolingInput, PoolingParams
from toolkit.errors import ToolkitError
from toolkit.loading import find_source, load_weights
from toolkit.training.loop import Trainer, train
from toolkit.training.objectives.reward import RewardModel

PAIRS = [
    {"prompt": "a b", "chosen": " c d", "rejected": " e"},
    {"prompt": "g h i", "chosen": " j", "rejected": " k l m", "margin": 0.5},
    *({"prompt": f"p{at}", "chosen": " q" * (at + 1), "rejected": " r"} for at in range(4)),
]


def recipe_of(folder: Path, lines: list[dict[str, Any]], **fields: Any) -> Any:
    folder.mkdir(exist_ok=True)
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"task": None, "data_files": str(path), "evaluation": {"val_set_size": 1e-9}, "pairs": 6, **fields}
    return objective_recipe(
        folder, "reward", given, model={"dtype": "float64"}, train={"batch_tokens": 24}, tokenizer={"vocab_size": 300}
    )


def test_a_run_has_the_loss_of_the_definition(tmp_path: Path) -> None:
    trainer = Trainer(recipe_of(tmp_path, PAIRS, center_rewards_coefficient=0.3), quiet=True)
    objective = trainer.objective
    assert isinstance(objective, RewardModel)
    micros = next(objective.updates(0))
    assert len(micros) > 1
    loss = torch.stack([objective.loss(trainer.forward, micro) for micro in micros]).sum()
    trainer.gradients.backward(loss)
    head = trainer.hf_model.score.weight.grad.clone()
    trainer.hf_model.zero_grad()

    model: Any = trainer.hf_model
    terms = []
    for pair in (pair for micro in micros for pair in micro if pair.weight):
        chosen, rejected = (
            model(input_ids=torch.tensor([pair.prompt + side])).logits[0, 0] for side in (pair.chosen, pair.rejected)
        )
        margin = 0.5 if len(pair.rejected) > len(pair.chosen) and pair.margin else 0.0
        terms.append(-torch.log(1 / (1 + torch.exp(-(chosen - rejected - margin)))) + 0.3 * (chosen + rejected) ** 2)
    assert len(terms) == 6
    exact = torch.stack(terms).mean()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-9)
    exact.backward()
    assert torch.allclose(head, model.score.weight.grad, rtol=1e-7)
    _, metrics = objective.finish()
    assert set(metrics) == {"accuracy", "margin", "mean_reward"}


def test_a_bad_margin_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="must have 'margin' as a number, got"):
        Trainer(recipe_of(tmp_path, [*PAIRS, {**PAIRS[0], "margin": "much"}]), quiet=True)


@pytest.mark.sweep
def test_pairs_are_learnt_and_the_checkpoint_scores(tmp_path: Path) -> None:
    result = train(
        objective_recipe(
            tmp_path, "reward", {"task": LOWER, "pairs": 16}, train={"max_steps": 12, "batch_tokens": 512},
            optimizer={"learning_rate": 1e-2}, evaluate={"do_eval": True}, checkpoint={"save_steps": None},
        ),
        quiet=True,
    )  # fmt: skip
    assert result["eval_accuracy"] > 0.9
    assert result["eval_margin"] > 0
    assert math.isfinite(result["eval_mean_reward"])
    source = find_source(tmp_path / "runs" / "reward")
    model = load_weights(source, runner="pooling")
    assert type(model).__name__ == "LlamaForSequenceClassification"
    engine = PoolingEngine(model)
    good, bad = engine.pool(
        [PoolingInput([5, 6, 70, 71]), PoolingInput([5, 6, 200, 201])], PoolingParams(use_activation=False)
    )
    assert good.data.shape == bad.data.shape == (1,)


@pytest.mark.sweep
@pytest.mark.parametrize("lora", [None, {"r": 2, "use_rslora": True}])
def test_resuming_is_exact(lora: dict[str, Any] | None, tmp_path: Path) -> None:
    warmup = {"warmup": {"max_steps": 2, "batch_tokens": 128}} if lora else {}
    recipe = objective_recipe(tmp_path, "reward", {"task": LOWER, "pairs": 6, **warmup}, model={"lora": lora})
    whole = Trainer(recipe, quiet=True)
    moved = moved_by_training(whole)
    assert any("score" in name for name in moved)
    assert bool(lora) == any("lora_B" in name for name in moved)
    check_resumes(whole, recipe)
