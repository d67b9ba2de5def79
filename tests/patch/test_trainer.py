"""A patched model inside transformers' own Trainer: the same losses as without the patch."""

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import toolkit
from toolkit.testing.models import random_model


@pytest.fixture(autouse=True)
def own_precision() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first Trainer; later tests must not inherit it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Sentences(Dataset):
    """Token ids with some labels ignored, as a collator would hand them over."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(331, (24, 20), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        labels = self.ids[at].clone()
        labels[:5] = -100
        return {"input_ids": self.ids[at], "attention_mask": torch.ones(20, dtype=torch.int64), "labels": labels}


def train(patched: bool, folder, **options) -> tuple[list[float], float, torch.Tensor]:
    model = random_model("llama")
    if patched:
        toolkit.patch(model)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=4, logging_steps=1, learning_rate=1e-3,
        report_to=[], save_strategy="no", use_cpu=True, seed=3, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences(),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda prediction: {"right": float((prediction.predictions == prediction.label_ids).mean())},
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = trainer.evaluate()
    return [*losses, result["eval_loss"]], result["eval_right"], model.lm_head.weight.detach()


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_losses_are_those_of_the_unpatched_model(options, tmp_path):
    ours, stock = train(True, tmp_path, **options), train(False, tmp_path, **options)
    assert ours[0] == pytest.approx(stock[0], rel=1e-5)
    assert ours[1] == stock[1]
    torch.testing.assert_close(ours[2], stock[2], rtol=1e-3, atol=1e-4)


def test_mixed_precision(tmp_path):
    """Autocast to bfloat16: as near to the unpatched model as two roundings are to each other."""
    ours, stock = train(True, tmp_path, bf16=True), train(False, tmp_path, bf16=True)
    assert ours[0] == pytest.approx(stock[0], rel=1e-2)
