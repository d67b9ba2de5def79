"""How the processes of a run share its model: ``train.distributed`` and ``train.expert_parallel`` of a recipe."""

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from toolkit.config.base import Count, Section

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

    strategy: Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"] = "ddp"
    """ddp: all of it in each process. fsdp2: torch's ``fully_shard`` by decoder layer. zero1, zero2, zero3: DeepSpeed's
    stages, which shard the optimizer's state; and gradients; and weights."""
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
    def by_deepspeed(self) -> bool:
        return self.strategy.startswith("zero")

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.cpu_offload and not self.shards:
            raise ValueError("train.distributed.cpu_offload must be false with train.distributed 'ddp', got true")
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
    allowed: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("optimizer.optim", recipe.optimizer.optim, ("adamw_torch_fused", "sgd")),
        ("train.expert_parallel", train.expert_parallel, (None,)),
        ("train.mixed_precision", train.mixed_precision, ("no", "bf16")),
        ("model.quantise", recipe.model.quantise, (None,)),
        ("model.dtype", recipe.model.dtype, ("float32",) if distributed.by_deepspeed else ("float32", "float64")),
    ]
    if strategy == "zero3":
        allowed.append(("train.ema_decay", train.ema_decay, (None,)))
    for name, value, values in allowed:
        if value not in values:
            given = value.model_dump() if isinstance(value, Section) else value
            wanted = " or ".join("null" if one is None else repr(one) for one in values)
            raise ValueError(f"{name} must be {wanted} with train.distributed '{strategy}', got {given!r}")
