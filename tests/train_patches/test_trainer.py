"""A patched model inside transformers' own Trainer: the same losses as without the patch, and no logits."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother as StockSmoother

from benchmarks.end_to_end import trainer_curve
from toolkit.errors import ToolkitError
from toolkit.ops.linear_logprob.deferred import DeferredLogits
from toolkit.patching import report_of
from toolkit.testing.models import random_model
from train_patches.trainer import LabelSmoother, patch_trainer


@pytest.fixture(autouse=True)
def own_precision() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first Trainer; later tests must not inherit it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()


class Sentences(Dataset):
    """Token ids with some labels ignored, more in one row than in another, and right padding."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, 331, (24, 20), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        labels, mask = self.ids[at].clone(), torch.ones(20, dtype=torch.int64)
        mask[20 - at % 4 :] = 0
        labels[: 5 + at % 9] = -100
        return {"input_ids": self.ids[at], "attention_mask": mask, "labels": torch.where(mask == 1, labels, -100)}


def make_trainer(folder, metrics=True, **options) -> Trainer:
    arguments = TrainingArguments(
        **{"output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1}
        | {"learning_rate": 1e-3, "report_to": [], "save_strategy": "no", "use_cpu": True, "seed": 3}
        | {"disable_tqdm": True}
        | options,
    )
    return Trainer(
        model=random_model("llama"), args=arguments, train_dataset=Sentences(), eval_dataset=Sentences(),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=(lambda p: {"right": float((p.predictions == p.label_ids).mean())}) if metrics else None,
    )  # fmt: skip


def train(patched: bool, folder, **options) -> tuple[list[float], float, torch.Tensor]:
    trainer = make_trainer(folder, **options)
    if patched:
        patch_trainer(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = trainer.evaluate()
    return [*losses, result["eval_loss"]], result["eval_right"], trainer.model.lm_head.weight.detach()


@pytest.mark.timeout(900)  # inductor calls a C++ compiler
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        pytest.param({"torch_compile": True}, marks=pytest.mark.sweep),  # by inductor
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_losses_are_those_of_the_unpatched_model(options, tmp_path):
    ours = train(True, tmp_path, **options)
    # Eager execution is the oracle of compilation too.
    stock = train(False, tmp_path, **{key: value for key, value in options.items() if "compile" not in key})
    assert ours[0] == pytest.approx(stock[0], rel=1e-5)
    assert ours[1] == stock[1]
    torch.testing.assert_close(ours[2], stock[2], rtol=1e-3, atol=1e-4)


def test_mixed_precision(tmp_path):
    """Autocast to bfloat16: as near to the unpatched model as two roundings are to each other."""
    ours, stock = train(True, tmp_path, bf16=True), train(False, tmp_path, bf16=True)
    assert ours[0] == pytest.approx(stock[0], rel=1e-2)


@pytest.mark.sweep
def test_two_hundred_steps_are_the_same_curve():
    result = trainer_curve.compare(200)
    assert result["largest_difference"] <= 1e-4
    assert result["curves"]["patched"][-1] < 0.5 * result["curves"]["patched"][0]


def test_no_logits_where_only_the_loss_is_asked_for(tmp_path):
    """Training, label smoothing and evaluation: the head's output is never computed, unless metrics want it."""
    for smoothing in (0.0, 0.1):
        options = {"label_smoothing_factor": smoothing, "max_steps": 2}
        trainer, stock = make_trainer(tmp_path, metrics=False, **options), make_trainer(tmp_path, **options)
        patch_trainer(trainer)
        outputs = []
        trainer.model.lm_head.register_forward_hook(lambda module, inputs, output, to=outputs: to.append(output))
        expected, got = stock.evaluate(), trainer.evaluate()
        assert got["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
        trainer.train()
        assert len(outputs) == 3 + 2
        assert all(isinstance(one, DeferredLogits) and one.dense is None for one in outputs)
        with torch.no_grad():  # and outside of the Trainer's evaluation logits are logits
            assert type(trainer.model(torch.arange(3, 9)[None]).logits) is torch.Tensor


def test_compiled_training_is_evaluated_without_logits(tmp_path):
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 1}
    trainer = make_trainer(tmp_path, metrics=False, **options)
    patch_trainer(trainer)
    trainer.train()
    outputs = []
    trainer.model.lm_head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    trainer.evaluate()
    assert len(outputs) == 3
    assert all(isinstance(one, DeferredLogits) and one.dense is None for one in outputs)


def test_smoothed_labels_and_their_gradients():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 50, (2, 7), generator=generator)
    labels[1, 3:] = -100
    for items in (None, 5, torch.tensor(9)):
        results = []
        for smoother in (StockSmoother(0.2), LabelSmoother(0.2)):
            logits = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            logits.requires_grad_()
            loss = smoother({"logits": logits}, labels, shift_labels=True, num_items_in_batch=items)
            loss.backward()
            results.append((loss.detach(), logits.grad))
        torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"args.use_liger_kernel": True},
            r"args\.use_liger_kernel must be False, as Liger replaces the same modules, got True",
        ),
        ({"args._n_gpu": 2}, r"args\.n_gpu must be 0 or 1, as DataParallel.*, got 2"),
        ({"model_init": random_model}, r"model_init must be None, as train\(\).*, got <function random_model"),
        (
            {"accelerator": SimpleNamespace(parallelism_config=SimpleNamespace(cp_enabled=True, cp_size=2))},
            r"parallelism_config\.cp_size must be 1, .*, got 2",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_lose_the_patch_is_refused_by_name(change, sentence, tmp_path):
    trainer = make_trainer(tmp_path)
    for path, value in change.items():
        holder, _, name = path.rpartition(".")
        setattr(trainer.args if holder else trainer, name, value)
    with pytest.raises(ToolkitError, match=sentence):
        patch_trainer(trainer)
    assert report_of(trainer.model) is None
    assert "prediction_step" not in trainer.__dict__
