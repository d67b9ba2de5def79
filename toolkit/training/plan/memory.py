"""Bytes that a process holds in training."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from toolkit.config import Recipe
from toolkit.config.objective import OnPolicySection
from toolkit.quantised import quantise
from toolkit.training.moments import SMALLEST
from toolkit.training.plan.model import LayerSizes

IN_8_BITS = 2.0 + 2 * 4 / 256
"""Bytes of an element's two moments in blocks of 256 with a scale each."""


USES = ("weights", "gathered", "gradients", "optimizer", "activations", "state")


@dataclass(frozen=True)
class Footprint:
    """Bytes by use, each with what it is.

    Args:
        weights: of the model, or of this process's shard, and of a reference.
        gathered: weights that a process has beside its shard in a rollout, an evaluation or when it saves.
        gradients: of what is trained.
        optimizer: its state, masters included.
        activations: that the backward of one forward needs.
        state: of the engine that rolls out.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    activations: int
    state: int
    about: dict[str, str]

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in USES)

    @property
    def rows(self) -> Iterator[tuple[str, int, str]]:
        """(use, bytes, what it is)."""
        for name in USES:
            yield name, getattr(self, name), self.about[name]


def needs_reference(objective: Any) -> bool:
    """Whether a copy of the initial model runs beside the one in training."""
    if objective.kind in ("grpo", "rloo", "reinforce_plus_plus"):
        return bool(objective.beta)
    return objective.kind in ("dpo", "kto") or getattr(objective, "teacher_model_kind", "") == "base"


def memory_of(recipe: Recipe, model: "nn.Module", sizes: LayerSizes, processes: int = 1) -> Footprint:
    """What one of so many processes holds. The activations are an estimate, the rest follows from shapes.

    Gradients and activations are held at another time than the gathered weights are; the total has them all.
    """
    dtype = getattr(torch, recipe.forward_dtype)
    weights = _weights(recipe, model)
    trained = [one for one in model.parameters() if one.requires_grad]
    count = sum(one.numel() for one in trained)
    objective, train = recipe.objective, recipe.train
    weighted = needs_reference(objective)
    state = 0
    if isinstance(objective, OnPolicySection):
        rollout = objective.rollout
        tokens = rollout.memory_tokens or rollout.max_num_seqs * train.max_length
        state = math.ceil(tokens / 16) * 16 * sizes.state * dtype.itemsize
    gradient = 8 if recipe.model.dtype == "float64" else 4
    strategy = train.distributed.strategy
    shares_weights = strategy in ("fsdp2", "zero3", "tp") and processes > 1
    shares_gradients = shares_weights or (strategy == "zero2" and processes > 1)
    part = _part(model, processes) if strategy == "tp" else 1 / processes
    of_weights, of_gradients = (part if shared else 1.0 for shared in (shares_weights, shares_gradients))
    of_optimizer = part if train.distributed.shards else 1.0
    if strategy == "tp" and recipe.model.lora is not None:  # adapters are whole
        of_gradients = of_optimizer = 1.0
    shard = f" of {processes} processes" if processes > 1 and train.distributed.shards else ""
    optimizer = _optimizer(recipe, model, trained)
    own = weights
    coded = 0
    if strategy == "fsdp2" and processes > 1 and recipe.model.quantise is not None:  # whole in every process
        coded = _codes(recipe, model)
    if strategy == "fsdp2" and processes > 1 and train.mixed_precision == "bf16":
        # The float32 weights are the shards themselves.
        optimizer -= 4 * sum(one.numel() for one in trained if one.itemsize == 2)
        own += 2 * sum(one.numel() for one in trained if one.itemsize == 2)
    about = {
        "weights": recipe.forward_dtype
        + (f", a shard{shard}" if shares_weights else "")
        + (", with a reference" if weighted else ""),
        "gathered": "all weights, to save" if strategy == "tp" else "all weights, in rollouts, evaluation and to save",
        "gradients": f"of {count / 1e6:.3f} M parameters" + (f", a shard{shard}" if shares_gradients else ""),
        "optimizer": recipe.optimizer.optim
        + (", with float32 weights" if _has_masters(recipe) else "")
        + (f", a shard{shard}" if shard else ""),
        "activations": f"of a forward of {train.batch_tokens:,} tokens",
        "state": "of the engine, at most",
    }
    return Footprint(
        weights=coded + int((own - coded) * of_weights) + (weights if weighted else 0),
        gathered=weights if shares_weights else 0,
        gradients=int(count * gradient * of_gradients),
        optimizer=int(optimizer * of_optimizer),
        activations=train.batch_tokens * (sizes.saved + 2 * sizes.hidden) * dtype.itemsize,
        state=state // processes if strategy == "tp" else state,
        about=about,
    )


def _part(model: "nn.Module", processes: int) -> float:
    """The part of the parameters that a process of tensor parallel holds: embeddings and vectors are whole in each."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    whole = {id(one): one.numel() for module in embeddings for one in module.parameters()}
    whole |= {id(one): one.numel() for one in model.parameters() if one.dim() < 2}
    share = sum(whole.values()) / max(sum(one.numel() for one in model.parameters()), 1)
    return share + (1.0 - share) / processes


def _weights(recipe: Recipe, model: "nn.Module") -> int:
    """Of the model in the dtype of its forward, and in fewer bits where the recipe says so."""
    total = sum(one.numel() * one.itemsize for one in model.parameters())
    dense = sum(module.weight.numel() * module.weight.itemsize for module in _quantised(recipe, model))
    return total - dense + _codes(recipe, model)


def _codes(recipe: Recipe, model: "nn.Module") -> int:
    """Of the weights that get fewer bits, with their scales."""
    shares: dict[tuple[int, torch.dtype], float] = {}
    total = 0
    for module in _quantised(recipe, model):
        row = module.in_features, module.weight.dtype
        if row not in shares:
            shares[row] = _share(*row, recipe.model.quantise)
        total += int(module.weight.numel() * module.weight.itemsize * shares[row])
    return total


def _quantised(recipe: Recipe, model: "nn.Module") -> Iterator[nn.Linear]:
    """The layers whose weights get fewer bits."""
    section = recipe.model.quantise
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if section is None or not isinstance(module, nn.Linear) or module is head or "lora_" in name:
            continue
        names = (name, f"{name}.weight")
        wanted = any(fnmatchcase(one, pattern) for one in names for pattern in section.include)
        left_out = any(fnmatchcase(one, pattern) for one in names for pattern in section.exclude or ())
        if wanted and not left_out:
            yield module


def _share(width: int, dtype: torch.dtype, section: Any) -> float:
    """Bytes of a quantised weight over those of the dense one, of a few rows of this width."""
    sample = nn.Sequential(nn.Linear(width, 32, bias=False, dtype=dtype))
    report = quantise(sample, section.format, **section.options)
    return report.quantised_bytes / report.dense_bytes


def _has_masters(recipe: Recipe) -> bool:
    return recipe.train.mixed_precision != "no" or recipe.trains_quantised


def _optimizer(recipe: Recipe, model: "nn.Module", trained: list[nn.Parameter]) -> int:
    """Moments, float32 copies of weights of fewer bits, and what rounding cut off."""
    section = recipe.optimizer
    outer = {id(one) for module in model.modules() if isinstance(module, nn.Embedding) for one in module.parameters()}
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None:
        outer.add(id(head.weight))
    rounded = {id(module.weight) for module in _quantised(recipe, model)}
    size = 0.0
    for one in trained:
        moment = 8 if one.dtype == torch.float64 else 4
        if section.optim == "adamw_8bit" and one.numel() >= SMALLEST:
            size += one.numel() * IN_8_BITS
        elif section.optim == "sgd" or (section.optim == "muon" and one.dim() == 2 and id(one) not in outer):
            size += one.numel() * moment
        elif section.optim == "adafactor" and one.dim() >= 2:
            size += moment * one.numel() * (1 / one.shape[-1] + 1 / one.shape[-2])
        elif section.optim == "adafactor":
            size += one.numel() * moment
        else:
            size += one.numel() * 2 * moment
        if id(one) in rounded or (recipe.train.mixed_precision != "no" and one.itemsize == 2):
            size += one.numel() * 4
        elif one.itemsize == 2 and section.kept_of_rounding == "kahan_sum":
            size += one.numel() * 2
    return int(size)
