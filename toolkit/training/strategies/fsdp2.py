"""Torch's ``fully_shard``: weights, gradients and optimizer in shards, decoder layer by decoder layer."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from toolkit.config import Recipe
from toolkit.patching.sharding import gathered_fsdp
from toolkit.quantised import quantised_weights
from toolkit.training.model import RaggedModel
from toolkit.training.optimizers import make_optimizer
from toolkit.training.precision import GradientStep, Masters
from toolkit.training.state import OptimizerState, optimizer_names, optimizer_state, read_optimizer
from toolkit.training.strategies.base import Strategy
from toolkit.training.strategies.shards import local_of, shard_like, whole_of


class FSDP2(Strategy):
    """The unit that is gathered for its forward, and again for its backward, is a decoder layer; the rest is another.

    With bf16 the shards are the float32 weights that the optimizer updates, and what is gathered are their roundings;
    gradients are summed over processes and micro-batches in float32.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        super().__init__(recipe, accelerator)
        self._rounded = recipe.train.mixed_precision == "bf16"

    def wrap(self, ragged: RaggedModel, masters: Masters | None) -> None:
        self.forward = self.ragged = ragged
        self._model, device = ragged.model, self.accelerator.device
        self._upcast(masters)
        ragged.to(device)
        half = torch.bfloat16 if self._rounded else None
        how: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (self.accelerator.num_processes,)),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=half, reduce_dtype=torch.float32 if self._rounded else None, cast_forward_inputs=False
            ),
            "offload_policy": CPUOffloadPolicy()
            if self.recipe.train.distributed.cpu_offload and device.type != "cpu"
            else OffloadPolicy(),
        }
        # Codes have no shards: a frozen base of few bits is whole in every process.
        how["ignored_params"] = {weight for _, weight in quantised_weights(self._model)}
        for unit in units_of(self._model):
            fully_shard(unit, **how)
        fully_shard(ragged, **how)  # what every loss calls; some call parts of the model inside of it
        self._shards: dict[str, Tensor] = dict(self._model.named_parameters())
        optimizer = make_optimizer(ragged, self.recipe.optimizer, None, self.recipe.seed)
        self.optimizer = SimpleNamespace(optimizer=optimizer, step=optimizer.step, zero_grad=optimizer.zero_grad)
        self.gradients = ShardedStep(self.accelerator, self.forward, self.optimizer, None, self.recipe.optimizer)

    def _gathered(self) -> AbstractContextManager[None]:
        return gathered_fsdp(self.ragged)

    @contextmanager
    def rewritten(self) -> Iterator[None]:
        with self.whole():
            yield
            for name, whole in self._model.named_parameters():
                shard = self._shards[name]
                local_of(shard).data.copy_(local_of(shard_like(whole.detach(), shard)))

    @contextmanager
    def saving(self) -> Iterator[OptimizerState | None]:
        found = optimizer_state(self.optimizer.optimizer, self._model, whole_of, self.accelerator.is_main_process)
        for name, shard in self._shards.items() if self._rounded else ():
            if shard.requires_grad:
                master = whole_of(shard.detach())
                if self.accelerator.is_main_process:
                    found.tensors[f"{name}/master"] = master.cpu()
        with self.whole():
            yield found if self.accelerator.is_main_process else None

    def load_optimizer(self, path: Path, groups: list[dict[str, Any]]) -> None:
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        state: dict[int, dict[str, Tensor]] = {}
        names = optimizer_names(optimizer, self._model)
        for index, name, key, value in read_optimizer(names, path, groups):
            shard = self._shards[name]
            if key == "master":
                local_of(shard).data.copy_(local_of(shard_like(value, shard)))
            elif value.shape == shard.shape:
                state.setdefault(index, {})[key] = shard_like(value, shard)
            else:
                state.setdefault(index, {})[key] = value.clone()
        own = optimizer.state_dict()["param_groups"]
        merged = [
            {**mine, **{key: saved[key] for key in mine if key in saved and key != "params"}}
            for mine, saved in zip(own, groups, strict=True)
        ]
        optimizer.load_state_dict({"state": state, "param_groups": merged})


class ShardedStep(GradientStep):
    """Gradients are averaged into shards with every micro-batch, so that no process ever holds all of them."""

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def _clip(self) -> Tensor:
        """The norm over all shards, summed in float64, which does not depend on the number of processes."""
        grads = [local_of(one.grad) for one in self._forward.parameters() if one.grad is not None]
        device = self._accelerator.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for grad in grads:
            total += torch.linalg.vector_norm(grad, dtype=torch.float64).square().to(device)
        dist.all_reduce(total)
        norm = total.sqrt().float()
        limit = self._section.max_grad_norm
        if limit is not None and norm > limit:
            for grad in grads:
                grad.mul_((limit / (norm + 1e-6)).to(grad.device, grad.dtype))
        return norm


def units_of(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers does not split over devices, inner ones first; else those of lists."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    units = [module for module in model.modules() if module is not model and type(module).__name__ in names]
    if not units:
        units = [layer for one in model.modules() if isinstance(one, nn.ModuleList) for layer in one]
    return units[::-1]
