"""Models split over ranks by transformers' plan: two real processes, which communicate over gloo."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as multiprocessing

from tests.helpers import tensor_parallel_ranks as ranks
from tests.helpers.adapter_folders import LINEAR, save_adapter
from tests.helpers.exchange_processes import run
from toolkit.testing.models import random_model

DENSE = ["llama", "qwen3", "gemma2", "phi3_longrope", "gpt_neox"]
MOE = ["qwen3_moe", "mixtral", "deepseek_v3_moe", "gpt_oss", "qwen3_next_moe"]


def in_ranks(tmp_path: Path, function: Callable[..., None], *arguments: Any, size: int = 2) -> None:
    """``function(rank, size, *arguments)`` in every rank."""
    multiprocessing.spawn(run, (size, str(tmp_path / "store"), function, *arguments), size)


def test_a_split_model_has_the_bits_of_one_process(tmp_path: Path) -> None:
    in_ranks(tmp_path, ranks.forward_and_gradients, ["qwen3"], "bitwise")


@pytest.mark.sweep
@pytest.mark.parametrize("numerics", ["bitwise", "fast"])
@pytest.mark.parametrize("families", [DENSE, MOE], ids=["dense", "moe"])
def test_forward_and_gradients(families: list[str], numerics: str, tmp_path: Path) -> None:
    in_ranks(tmp_path, ranks.forward_and_gradients, families, numerics)


@pytest.mark.sweep
def test_three_ranks(tmp_path: Path) -> None:
    """Widths that the ranks do not divide."""
    in_ranks(tmp_path, ranks.forward_and_gradients_of_three, size=3)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.sweep), pytest.param(3, marks=pytest.mark.soak)])
def test_collectives(size: int, tmp_path: Path) -> None:
    in_ranks(tmp_path, ranks.collectives, size=size)


@pytest.mark.sweep
def test_fifty_steps_of_training(tmp_path: Path) -> None:
    in_ranks(tmp_path, ranks.training, ["llama", "qwen3_moe"], 50)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("llama", marks=pytest.mark.sweep),
        pytest.param("qwen3", marks=pytest.mark.soak),
        pytest.param("qwen3_moe", marks=pytest.mark.sweep),
    ],
)
def test_engines_agree_over_random_schedules(family: str, tmp_path: Path) -> None:
    in_ranks(tmp_path, ranks.engines, [family], 6)


@pytest.mark.sweep
def test_rollouts_and_steps(tmp_path: Path) -> None:
    in_ranks(tmp_path, ranks.rollouts)


@pytest.mark.sweep
def test_requests_choose_adapters(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    kinds: dict[str, dict[str, Any]] = {
        "narrow": {"target_modules": ["q_proj", "v_proj"]},
        "every": {"rank": 7, "target_modules": [*LINEAR, "lm_head", "embed_tokens"]},
        "dora": {"use_dora": True},
    }
    folders = {
        f"{family}/{name}": save_adapter(random_model(family), tmp_path / family / name, seed, **options)
        for family in ("llama", "qwen3")
        for seed, (name, options) in enumerate(kinds.items())
    }
    in_ranks(tmp_path, ranks.adapters, folders)


@pytest.mark.sweep
def test_gradients_of_adapters(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = save_adapter(random_model("llama"), tmp_path / "adapter", target_modules=list(LINEAR))
    in_ranks(tmp_path, ranks.adapter_gradients, folder)


@pytest.mark.sweep
def test_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    in_ranks(tmp_path, ranks.errors)


@pytest.mark.sweep
def test_example_of_the_docs(tmp_path: Path) -> None:
    in_ranks(tmp_path, ranks.example, tmp_path)
