"""The optimizers of recipes, each against what it is made of, and saved and read between two steps."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from toolkit.config.optimization import OptimizerSection, ScheduleSection
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model
from toolkit.training.model import RaggedModel
from toolkit.training.optimizers import make_optimizer
from toolkit.training.schedule import make_scheduler
from toolkit.training.state import load_optimizer, save_optimizer

OPTIMS = ("adamw_torch_fused", "adamw_8bit", "adafactor", "muon", "sgd")


def small_model() -> nn.Module:
    return random_model("qwen3_moe", hidden=16, vocabulary=40)


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        gradients(model, step)
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("optim", OPTIMS)
def test_a_run_that_is_saved_and_read_goes_on_bit_for_bit(optim: str, tmp_path: Any) -> None:
    section = OptimizerSection(optim=optim, learning_rate=1e-2)
    whole = small_model()
    parts = copy.deepcopy(whole)
    steps(whole, make_optimizer(whole, section), 0, 6)
    first = make_optimizer(parts, section)
    steps(parts, first, 0, 3)
    groups = save_optimizer(first, parts, tmp_path / "state.safetensors")
    second = make_optimizer(parts, section)
    load_optimizer(second, parts, tmp_path / "state.safetensors", groups)
    steps(parts, second, 3, 6)
    assert equal(values(parts), values(whole))


def test_muon_moves_matrices_of_layers_and_adamw_the_rest() -> None:
    model = RaggedModel(small_model())
    muon, adam = copy.deepcopy(model), copy.deepcopy(model)
    before = values(model)
    steps(model, make_optimizer(model, OptimizerSection(optim="muon", learning_rate=1e-2)), 0, 3)
    matrices = [one for one in muon.parameters() if one.dim() == 2]
    rate = {"lr": 1e-2, "weight_decay": 0.1}
    steps(muon, torch.optim.Muon(matrices, momentum=0.95, adjust_lr_fn="match_rms_adamw", **rate), 0, 3)
    steps(adam, make_optimizer(adam, OptimizerSection(learning_rate=1e-2)), 0, 3)
    found, of_muon, of_adam = values(model), values(muon), values(adam)
    outer = {"model.model.embed_tokens.weight", "model.lm_head.weight"}
    inner = {name for name, one in found.items() if one.dim() == 2} - outer
    assert inner
    assert outer <= found.keys()
    for name, one in found.items():
        assert torch.equal(one, (of_muon if name in inner else of_adam)[name]), name
        assert not torch.equal(one, before[name])


@pytest.mark.parametrize("size", [(6,), (6, 5)])
def test_muon_has_parameters_of_one_kind(size: tuple[int, ...]) -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(size))])
    steps(model, make_optimizer(model, OptimizerSection(optim="muon")), 0, 1)
    assert not torch.equal(model[0], torch.ones(size))


def test_adafactor_is_that_of_transformers_trainer() -> None:
    model = small_model()
    other = copy.deepcopy(model)
    steps(model, make_optimizer(model, OptimizerSection(optim="adafactor", learning_rate=1e-2, weight_decay=0.0)), 0, 3)
    args = transformers.TrainingArguments(output_dir="unused", optim="adafactor", learning_rate=1e-2, use_cpu=True)
    cls, settings = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    steps(other, cls(other.parameters(), **settings), 0, 3)
    assert equal(values(model), values(other))


@pytest.mark.parametrize("optim", ["adafactor", "muon", "sgd"])
def test_a_loss_falls(optim: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
    inputs = torch.randn(64, 6)
    targets = inputs.sum(-1, keepdim=True).tanh()
    optimizer = make_optimizer(model, OptimizerSection(optim=optim, learning_rate=1e-2, weight_decay=0.0))
    losses = []
    for _ in range(200):
        loss = nn.functional.mse_loss(model(inputs), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


def rates(steps: int, **fields: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make_scheduler(optimizer, ScheduleSection(**fields), steps)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules_have_transformers_names_and_rates() -> None:
    linear = rates(10, lr_scheduler_type="linear", warmup_ratio=0.15)
    assert linear == pytest.approx([0.0, 1.0, *(2.0 * (10 - step) / 8 for step in range(2, 10))])
    assert rates(4, lr_scheduler_type="constant") == [2.0] * 4
    restarts = rates(8, lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2})
    assert restarts[:4] == pytest.approx(restarts[4:])
    root = rates(12, lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": 0.5})
    assert root[3] == pytest.approx(2.0 * (9 / 12) ** 0.5, rel=1e-4)


def test_settings_that_a_schedule_does_not_have_are_a_sentence() -> None:
    with pytest.raises(ToolkitError, match=r"schedule\.lr_scheduler_kwargs must be settings of 'linear', got"):
        rates(3, lr_scheduler_type="linear", lr_scheduler_kwargs={"power": 2.0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup_steps": 2, "warmup_ratio": 0.1}, "at most one of schedule.warmup_steps and schedule.warmup_ratio"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 2}, "must be 'constant_with_warmup' for a constant rate"),
        ({"lr_scheduler_kwargs": {"power": 1.0}}, "schedule.lr_scheduler_kwargs must be empty with"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleSection(**fields)
