"""How the processes of a run share its model: ``train.distributed`` and ``train.expert_parallel`` of a recipe."""

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from toolkit.config.base import Count, Section
from toolkit.config.objective import OnPolicySection

if TYPE_CHECKING:
    from toolkit.config.schema import Recipe


class ExpertParallelSection(Section):
    """Experts of each layer sharded over processes, instead of a copy of all in each."""

    size: Count | None = None
    """Processes that share a layer's experts; it must divide their number, and that of the experts. null is all."""
    chunks: Count = 2
    """Chunks of a forward's tokens: the exchange of one overlaps the GEMMs of another."""


class DistributedSection(Section):
    """How the processes of a run share its model. One process has all of it under each of these."""

    strategy: Literal["ddp", "fsdp2", "zero1", "zero2", "zero3", "tp"] = "ddp"
    """ddp: all of it in each process. fsdp2: torch's ``fully_shard`` by decoder layer. zero1, zero2, zero3: DeepSpeed's
    stages, which shard the optimizer's state; and gradients; and weights. tp: tensor parallel by transformers'
    ``tp_plan``, where all processes train on the same examples."""
    cpu_offload: bool = False
    """Keep what is sharded in host memory: weights and optimizer of fsdp2 and zero3, the optimizer of zero1 and
    zero2."""
    deepspeed: str | None = None
    """A JSON file of DeepSpeed for zero1, zero2 and zero3: its ``zero_optimization`` and what the recipe has no field
    for. What the recipe has a field for must be "auto" or absent there."""

    @property
    def shards(self) -> bool:
        """Whether a process may have a part of something only."""
        return self.strategy != "ddp"

    @property
    def same_data(self) -> bool:
        """Whether all processes train on the same examples."""
        return self.strategy == "tp"

    @property
    def by_deepspeed(self) -> bool:
        return self.strategy.startswith("zero")

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.cpu_offload and self.strategy in ("ddp", "tp"):
            raise ValueError(
                f"train.distributed.cpu_offload must be false with train.distributed '{self.strategy}', got true"
            )
        if self.deepspeed is not None and not self.by_deepspeed:
            raise ValueError(
                f"train.distributed.deepspeed must be null with train.distributed '{self.strategy}', got "
                f"'{self.deepspeed}'; it is for zero1, zero2 and zero3"
            )
        if self.deepspeed is not None and self.cpu_offload:
            raise ValueError(
                "train.distributed.cpu_offload must be false with train.distributed.deepspeed, whose zero_optimization "
                "says what is offloaded, got true"
            )
        return self


def check_distributed(recipe: "Recipe") -> None:
    """Raise ValueError, naming the field, for what the strategy of a recipe does not take."""
    distributed, train = recipe.train.distributed, recipe.train
    if not distributed.shards:
        return
    strategy = distributed.strategy
    precisions = ("no", "bf16", "fp16") if strategy == "tp" else ("no", "bf16")
    allowed: list[tuple[str, Any, tuple[Any, ...], str]] = [
        ("optimizer.optim", (optim := recipe.optimizer.optim), ("adamw_torch_fused", "sgd"), _OF_WHOLE.get(optim, "")),
        ("train.expert_parallel", train.expert_parallel, (None,), "experts are sharded as all other weights are"),
        ("train.mixed_precision", train.mixed_precision, precisions, "its loss scale is not kept by it"),
        (
            "model.dtype",
            recipe.model.dtype,
            ("float32",) if distributed.by_deepspeed else ("float32", "float64"),
            "the shards that are updated have more bits than the weights that are computed with",
        ),
    ]
    if strategy != "fsdp2" or recipe.model.lora is None:  # there a frozen base is whole in every process
        why = "DeepSpeed writes" if distributed.by_deepspeed else "shards would have"
        why += " parts of weights, which codes of few bits do not take"
        allowed.append(("model.quantise", recipe.model.quantise, (None,), why))
    if strategy == "tp":
        for name, value in (("use_dora", False), ("target_parameters", None), ("trainable_token_indices", None),
                            ("modules_to_save", None)):  # fmt: skip
            given = getattr(recipe.model.lora, name, value)
            allowed.append((f"model.lora.{name}", given, (value,), "no process has these weights whole"))
        same = "the same requests must reach the engine in every process, in one order"
        objective = recipe.objective
        names = (*objective.environment_fields, "rollout_func") if isinstance(objective, OnPolicySection) else ()
        for name in names:
            allowed.append((f"objective.{name}", getattr(objective, name, None) or None, (None,), same))
        rollout = getattr(objective, "rollout", None)
        for name in ("speculative_config", "engine") if rollout is not None else ():
            allowed.append((f"objective.rollout.{name}", getattr(rollout, name), (None,), same))
    if strategy == "zero3":
        allowed.append(("train.ema_decay", train.ema_decay, (None,), "weights are not there between two forwards"))
    for name, value, values, why in allowed:
        if value not in values:
            given = value.model_dump() if isinstance(value, Section) else value
            wanted = " or ".join(_YAML.get(one, repr(one)) for one in values)
            got = "true" if given is True else repr(given)
            raise ValueError(f"{name} must be {wanted} with train.distributed '{strategy}', got {got}: {why}")


_YAML: dict[Any, str] = {None: "null", False: "false"}
_OF_WHOLE = {
    "adamw_8bit": "a block of its moments would be on two processes",
    "adafactor": "its moments are means over whole rows and columns",
    "muon": "its update is of whole matrices",
}
"""Why an optimizer does not update shards."""
