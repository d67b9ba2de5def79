"""Process reward models: the loss by its definition and transformers' forward, what counts, what the checkpoint is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.objective_recipes import LOWER, check_resumes, moved_by_training, objective_recipe
from toolkit.engine.pooling import PoolingEngine, PoolingInput, PoolingParams
from toolkit.errors import ToolkitError
from toolkit.loading import find_source, load_weights
from toolkit.ops import IGNORED
from toolkit.training.formats import stepwise
from toolkit.training.loop import Trainer, train
from toolkit.training.objectives.prm import PRM

LINES: list[dict[str, Any]] = [
    {"prompt": "a b", "completions": [" c d", " e"], "labels": [True, False]},
    {"prompt": "g h i", "completions": [" j"], "labels": [1]},
    *({"prompt": f"p{at}", "completions": [" q" * (at + 1), " r"], "labels": [at % 2, 0]} for at in range(4)),
]


def recipe_of(folder: Path, lines: list[dict[str, Any]], **fields: Any) -> Any:
    folder.mkdir(exist_ok=True)
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"task": None, "data_files": str(path), "evaluation": {"val_set_size": 1e-9}, "lines": 6, **fields}
    return objective_recipe(
        folder, "prm", given, model={"dtype": "float64"}, train={"batch_tokens": 24}, tokenizer={"vocab_size": 300}
    )


@pytest.mark.parametrize("last_only", [False, True])
def test_a_run_has_the_loss_of_the_definition(last_only: bool, tmp_path: Path) -> None:
    trainer = Trainer(recipe_of(tmp_path, LINES, train_on_last_step_only=last_only, step_separator=" |"), quiet=True)
    objective = trainer.objective
    assert isinstance(objective, PRM)
    micros = next(objective.updates(0))
    assert len(micros) > 1
    loss = torch.stack([objective.loss(trainer.forward, micro) for micro in micros]).sum()
    trainer.gradients.backward(loss)
    head = trainer.hf_model.score.weight.grad.clone()
    trainer.hf_model.zero_grad()

    model: Any = trainer.hf_model
    tokens, terms = trainer.tokenizer, []
    for line in LINES:
        ids, ends = tokens(line["prompt"], add_special_tokens=False)["input_ids"], []
        if tokens.bos_token_id is not None:
            ids = [tokens.bos_token_id, *ids]
        for text in line["completions"]:
            for part in (text, " |"):
                ids = ids + tokens(part, add_special_tokens=False)["input_ids"]
            ends.append(len(ids) - 1)
        logits = model(input_ids=torch.tensor([ids])).logits[0] + 0.0
        counted = list(zip(ends, line["labels"]))[-1:] if last_only else list(zip(ends, line["labels"]))
        terms += [-logits[at].log_softmax(-1)[int(label)] for at, label in counted]
    assert len(terms) == (6 if last_only else 11)
    exact = torch.stack(terms).mean()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-9)
    exact.backward()
    assert torch.allclose(head, model.score.weight.grad, rtol=1e-7)
    _, metrics = objective.finish()
    assert set(metrics) == {"accuracy", "right_steps"}


def test_prompts_are_cut_at_their_beginning_and_steps_at_their_end(tmp_path: Path) -> None:
    long = {"prompt": "9 z 7 y 5 w 3 v", "completions": [" one", " two"], "labels": [1, 0]}
    recipe = recipe_of(tmp_path, [long, *LINES], max_prompt_length=5)
    objective = Trainer(recipe, quiet=True).objective
    assert isinstance(objective, PRM)
    (whole,) = objective._tokenised(stepwise(long)).examples
    assert whole.labels[:5] == [IGNORED] * 5
    assert [label for label in whole.labels if label != IGNORED] == [1, 0]
    room = len(whole.ids) - 1
    objective.recipe = objective.recipe.model_copy(
        update={"train": objective.recipe.train.model_copy(update={"max_length": room})}
    )
    (cut,) = objective._tokenised(stepwise(long)).examples
    assert (cut.ids, cut.cut) == (whole.ids[:room], True)
    assert cut.counted() == 1
    assert cut.counted(last_only=True) == 0  # its last step is left out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "a", "completions": [], "labels": []}, "must have a label for each of its 'completions'"),
        ({"prompt": "a", "completions": ["b"], "labels": [True, False]}, "got 1 completions and 2 labels"),
        (
            {"prompt": "a", "completions": ["b"], "labels": ["yes"]},
            r"true or false in labels\[0\], got 'yes'",
        ),
        ({"prompt": "a", "completions": ["b"], "labels": [2]}, r"must have true or false in labels\[0\], got 2"),
        ({"prompt": "a", "completions": [["b"]], "labels": [1]}, r"must have a string in completions\[0\]"),
        (
            {"prompt": "a", "completion": "b"},
            "a JSON object with 'prompt' as a string, 'completions' as a list",
        ),
    ],
)
def test_a_bad_line_is_one_sentence(line: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match=said):
        Trainer(recipe_of(tmp_path, [*LINES, line]), quiet=True)


@pytest.mark.sweep
def test_steps_are_learnt_and_the_checkpoint_classifies_tokens(tmp_path: Path) -> None:
    result = train(
        objective_recipe(
            tmp_path, "prm", {"task": LOWER, "lines": 16}, train={"max_steps": 12, "batch_tokens": 512},
            optimizer={"learning_rate": 1e-2}, evaluate={"do_eval": True}, checkpoint={"save_steps": None},
        ),
        quiet=True,
    )  # fmt: skip
    assert result["eval_accuracy"] > 0.9
    assert result["eval_loss"] < result["before_training"]["eval_loss"]
    model = load_weights(find_source(tmp_path / "runs" / "prm"), runner="pooling")
    assert type(model).__name__ == "LlamaForTokenClassification"
    ids = [5, 6, 70, 71]
    (found,) = PoolingEngine(model).pool([PoolingInput(ids)], PoolingParams(use_activation=False))
    exact = model(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found.data, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_resuming_is_exact(lora: dict[str, Any] | None, tmp_path: Path) -> None:
    warmup = {"warmup": {"max_steps": 2, "batch_tokens": 128}} if lora else {}
    recipe = objective_recipe(tmp_path, "prm", {"task": LOWER, "lines": 6, **warmup}, model={"lora": lora})
    whole = Trainer(recipe, quiet=True)
    moved = moved_by_training(whole)
    assert any("score" in name for name in moved)
    assert bool(lora) == any("lora_B" in name for name in moved)
    check_resumes(whole, recipe)
