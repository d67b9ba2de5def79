"""DeepSpeed's ZeRO: 1 shards the optimizer's state, 2 gradients too, 3 weights too."""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.errors import ToolkitError, first_line
from toolkit.patching.sharding import gathered_zero
from toolkit.training.model import RaggedModel
from toolkit.training.optimizers import make_optimizer
from toolkit.training.precision import GradientStep, Masters
from toolkit.training.state import OptimizerState, optimizer_names, read_optimizer
from toolkit.training.strategies.base import Strategy

OF_RECIPE = {
    "train_batch_size": "train.batch_tokens",
    "train_micro_batch_size_per_gpu": "train.batch_tokens",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "train.mixed_precision",
    "fp16": "train.mixed_precision",
}
"""Keys of DeepSpeed's settings that a recipe has fields for."""
MASTER = "master"


class Zero(Strategy):
    """ZeRO by DeepSpeed's engine, with the recipe's optimizer over flat partitions of float32 weights.

    A checkpoint holds the optimizer's state by parameter, as that of one process does.
    """

    def wrap(self, ragged: RaggedModel, masters: Masters | None) -> None:
        deepspeed = _deepspeed(self.recipe.train.distributed.strategy)
        self.ragged = ragged
        device = self.accelerator.device
        if device.type == "cpu":
            # It would be compiled first; gloo does not need it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        values = self._upcast(masters)
        ragged.to(device)
        base = make_optimizer(ragged, self.recipe.optimizer, None, self.recipe.seed)
        self._names = optimizer_names(base, ragged.model)
        self._grouped = [len(group["params"]) for group in base.param_groups]
        self._parameters: dict[str, Any] = dict(ragged.model.named_parameters())
        self._engine, *_ = deepspeed.initialize(
            model=ragged, optimizer=base, config=self._settings(ragged), dist_init_required=False
        )
        self._base: torch.optim.Optimizer = base
        self._stage = int(self._engine.zero_optimization_stage())
        self.forward = self._engine
        self.optimizer = SimpleNamespace(optimizer=base)
        self.gradients = step = ZeroStep(self.accelerator, self._engine, self.optimizer, None, self.recipe.optimizer)
        step.guard(base)
        for name in self._names if values else ():
            self._write(name, None, values[self._parameters[name]])

    def _settings(self, ragged: RaggedModel) -> dict[str, Any]:
        """What DeepSpeed is told. Of a file of the user's own: all that the recipe has no field for."""
        section, stage = self.recipe.train.distributed, int(self.recipe.train.distributed.strategy[-1])
        given = read_settings(section.deepspeed, stage) if section.deepspeed is not None else {}
        zero = given.pop("zero_optimization", {"contiguous_gradients": True})
        if section.cpu_offload:
            zero["offload_optimizer"] = {"device": "cpu"}
            if stage == 3:
                zero["offload_param"] = {"device": "cpu"}
        # A buffer of its default size, 500 million numbers, is more than a small model has.
        largest = sum(one.numel() for one in ragged.parameters() if one.requires_grad)
        zero.setdefault("reduce_bucket_size", min(500_000_000, max(largest, 1)))
        rounded = self.recipe.train.mixed_precision == "bf16"
        if rounded:
            given.setdefault("communication_data_type", "fp32")
            if stage > 1:
                given.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        return {
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **given,
            "train_micro_batch_size_per_gpu": 1,
            # More than one, for there may be several; none is scaled by it.
            "gradient_accumulation_steps": 2,
            "gradient_clipping": self.recipe.optimizer.max_grad_norm or 0.0,
            "bf16": {"enabled": rounded},
            "zero_optimization": {**zero, "stage": stage},
        }

    def _gathered(self) -> AbstractContextManager[None]:
        return gathered_zero(self.ragged)

    def rewritten(self) -> AbstractContextManager[None]:
        return gathered_zero(self.ragged, rewritten=True) if self._stage == 3 else nullcontext()

    def _flats(self) -> list[Tensor]:
        """The optimizer's own parameters: this process's partitions."""
        zero = self._engine.optimizer
        flats: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        )
        return flats

    def _partition(self, name: str, key: str | None) -> tuple[Tensor | None, int, int]:
        """This process's part of a parameter's state, or of its weight; where that begins; the padded size of all."""
        parameter, zero = self._parameters[name], self._engine.optimizer
        if self._stage == 3:
            part, _ = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
            begin = part.numel() * zero._get_param_partition_rank(parameter)
            return part, begin, max(part.numel() * dist.get_world_size(), parameter.ds_numel)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None, 0, parameter.numel()
        flat = mapping.hp_fragment
        if key is not None:
            whole = self._base.state[self._flats()[mapping.param_group_index]][key]
            flat = whole.narrow(0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)
        return flat, mapping.lp_fragment_address.start, parameter.numel()

    def _shape(self, name: str) -> torch.Size:
        parameter = self._parameters[name]
        shape: torch.Size = parameter.ds_shape if self._stage == 3 else parameter.shape
        return shape

    def _read(self, name: str, key: str | None) -> Tensor:
        """The whole of a parameter's state; all processes must call it."""
        part, begin, size = self._partition(name, key)
        whole = torch.zeros(size, dtype=torch.float32, device=self.accelerator.device)
        if part is not None:
            whole[begin : begin + part.numel()] = part.to(whole.device)
        dist.all_reduce(whole)  # parts do not overlap: each number is added to zeros
        shape = self._shape(name)
        return whole[: shape.numel()].view(shape)

    @torch.no_grad()
    def _write(self, name: str, key: str | None, whole: Tensor) -> None:
        """Keep this process's part of the whole of a parameter's state."""
        part, begin, size = self._partition(name, key)
        if part is not None:
            padded = torch.zeros(size, dtype=part.dtype)
            padded[: whole.numel()] = whole.reshape(-1)
            part.copy_(padded[begin : begin + part.numel()])

    @contextmanager
    def saving(self) -> Iterator[OptimizerState | None]:
        main = self.accelerator.is_main_process
        tensors: dict[str, Tensor] = {}
        state: dict[str, Any] = next(
            (self._base.state[flat] for flat in self._flats() if self._base.state.get(flat)), {}
        )
        keys: list[str | None] = [key for key in state if key != "step"]
        if self.recipe.train.mixed_precision == "bf16":
            keys.append(None)
        for name in self._names:
            for key in keys:
                whole = self._read(name, key).cpu()
                if main:
                    tensors[f"{name}/{key or MASTER}"] = whole.contiguous()
            if "step" in state:
                tensors[f"{name}/step"] = state["step"].detach().cpu().clone()
        groups, rest = [], list(self._names)
        for group, count in zip(self._base.param_groups, self._grouped, strict=True):
            groups.append({**group, "params": rest[:count]})
            rest = rest[count:]
        with self.whole():
            yield OptimizerState(tensors, groups) if main else None

    def load_optimizer(self, path: Path, groups: list[dict[str, Any]]) -> None:
        flats = self._flats()
        for _, name, key, value in read_optimizer(self._names, path, groups):
            if key == "step":
                for flat in flats:
                    self._base.state[flat]["step"] = value.to(flat.device, copy=True)
            elif key == MASTER:
                self._write(name, None, value)
            else:
                for flat in flats:
                    if key not in self._base.state[flat]:
                        self._base.state[flat][key] = torch.zeros_like(flat, requires_grad=False)
                self._write(name, key, value)
        for group, saved in zip(self._base.param_groups, groups, strict=True):
            group.update({key: saved[key] for key in group if key in saved and key != "params"})


class ZeroStep(GradientStep):
    """DeepSpeed's engine reduces, clips and steps."""

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    @property
    def _engine(self) -> Any:
        return self._forward

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the engine's optimizer do nothing in a step that is to be skipped: its norm is known by then."""
        update: Any = optimizer.step

        def step(_: torch.optim.Optimizer, closure: Any = None) -> None:
            if self._wanted and bool(torch.isfinite(self._norm())):
                update()

        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]

    def _norm(self) -> Tensor:
        norm = self._engine.optimizer._global_grad_norm  # None or infinite where DeepSpeed saw an overflow
        return torch.as_tensor(math.inf if norm is None else norm).float().cpu()

    def finish(self, step: int, loss: Tensor) -> Tensor:
        self._wanted = self._finite_everywhere(loss)
        self._engine.step()
        norm = self._norm()
        self.updated = self._wanted and bool(torch.isfinite(norm))
        self._count_skipped(step, loss, norm)
        return norm


def read_settings(path: str, stage: int) -> dict[str, Any]:
    """DeepSpeed's settings of a JSON file, without those that are "auto".

    Raises:
        ToolkitError: no JSON, another stage, or a setting that the recipe has a field for.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToolkitError(
            f"train.distributed.deepspeed must be a JSON file of DeepSpeed, got '{path}' ({first_line(error)})."
        ) from None
    if not isinstance(given, dict):
        raise ToolkitError(f"train.distributed.deepspeed must be a JSON file of settings, got '{path}'.")
    found = (given.get("zero_optimization") or {}).get("stage")
    if found != stage:
        raise ToolkitError(
            f"zero_optimization.stage of train.distributed.deepspeed, '{path}', must be {stage} with "
            f"train.distributed 'zero{stage}', got {found!r}."
        )
    for key, field in OF_RECIPE.items():
        if key in given and not _automatic(given.pop(key)):
            raise ToolkitError(
                f"{key} must be \"auto\" or absent in train.distributed.deepspeed, '{path}': the recipe has {field}."
            )
    given["zero_optimization"] = {k: v for k, v in given["zero_optimization"].items() if v != "auto"}
    return {key: value for key, value in given.items() if value != "auto"}


def _automatic(value: Any) -> bool:
    """Whether a setting leaves to others what it is."""
    if isinstance(value, dict):
        return value.get("enabled") is False or all(_automatic(one) for key, one in value.items() if key != "type")
    return bool(value == "auto")


def _deepspeed(strategy: str) -> Any:
    try:
        import deepspeed
    except ImportError:
        raise ToolkitError(
            f"train.distributed '{strategy}' needs the package deepspeed, which is not installed; fsdp2 needs none."
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
