"""16-bit weights in training: what the forward reads, what the optimizer updates, and loss scaling.

The module's parameters have the dtype of the forward, so training, rollout and evaluation read the same weights. What
16 bits cannot hold of an update (at a learning rate of 1e-5 most of it) is kept beside them as optimizer state. No
autocast is involved. Gradients add up in float32.
"""

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from toolkit.config.optimization import OptimizerSection
from toolkit.errors import ToolkitError
from toolkit.moe.sharded_parameters import ShardedParameters
from toolkit.quantised import QuantisedWeight, dense_values
from toolkit.training.moments import MOMENTS, update

Masters = dict[nn.Parameter, Tensor]
"""Of each parameter that was rounded to 16 bits or to codes, its value in float32."""


def lower_precision(model: Any, name: str) -> Masters:
    """Rounds the float32 parameters of a transformers model to the dtype of this name, in place; what they were.

    Of frozen parameters nothing is kept.
    Those that the model's class keeps in float32 stay, as in ``from_pretrained(dtype=...)``; buffers too.
    """
    dtype = getattr(torch, name)
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    whole = re.compile("|".join(rf"(^|\.){name}($|\.)" for name in sorted(kept)) or r"(?!)")
    masters: Masters = {}
    if dtype in (torch.bfloat16, torch.float16):
        for path, parameter in model.named_parameters():
            if parameter.dtype == torch.float32 and not whole.search(path):
                if parameter.requires_grad:
                    masters[parameter] = parameter.data
                parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    return masters


def move_to_fresh_memory(model: nn.Module) -> None:
    """Copy every dense tensor: loaded ones may lie at any address, fresh ones are aligned the same, and bits can depend
    on it."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, QuantisedWeight):
            tensor.data = tensor.data.clone()


def stochastic_round(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16: up with a probability of the distance from the lower neighbour, so that the mean is exact.

    NaN and infinities stay.
    """
    noise = torch.randint(1 << 16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    rounded = ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) with state or parameters of fewer bits than its arithmetic, which is float32.

    State of each parameter: ``step``, ``exp_avg`` and ``exp_avg_sq`` in float32 or in 8 bits, and for one of 16 bits

    - ``master``: the weight in float32, of which the parameter is the rounding (the default);
    - ``kahan_comp``: what rounding cut off, in the parameter's dtype, added to the weight before the next update
      (``kahan_sum``; as in optimi);
    - nothing: ``bf16_stochastic_round`` (as in torchao). The noise depends on seed, parameter and step alone, so
      processes and resumed runs agree.

    Neither kind: rounding to nearest, which loses most updates. A float32 parameter is updated as it is. A
    ``QuantisedWeight`` has a ``master`` in any case, which each step rounds to its codes (``quantise_``).

    Args:
        groups: of parameters, with ``weight_decay``.
        masters: values in float32 to start from, by parameter; others start from the parameter. Emptied.
        keep: "master", "kahan_sum", "bf16_stochastic_round" or "none".
        seed: of stochastic rounding.
        optim: "adamw_torch_fused", or "adamw_8bit": moments in 8 bits (``toolkit.ops.adamw_8bit``) but of small
            parameters.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        keep: str = "master",
        masters: Masters | None = None,
        seed: int = 0,
        optim: str = "adamw_torch_fused",
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._moments = MOMENTS[optim]
        self.keep, self.seed, self._masters = keep, seed, {} if masters is None else masters
        self.add_gradients_in_float32()
        for parameter in self._parameters():
            self._start(parameter)
        self._masters.clear()

    def add_gradients_in_float32(self) -> None:
        """Let torch convert each gradient before it is added to those of earlier micro-batches."""
        for parameter in self._parameters():
            parameter.grad_dtype = torch.float32

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _start(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state.update(self._moments(parameter))
        if _is_plain(parameter):
            return
        if self.keep == "master" or isinstance(parameter, QuantisedWeight):
            given = self._masters.get(parameter)
            state["master"] = dense_values(parameter) if given is None else given.to(parameter.device)
        elif self.keep == "kahan_sum":
            state["kahan_comp"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(group, index, parameter)

    def _update(self, group: dict[str, Any], index: int, parameter: nn.Parameter) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        weight = parameter if _is_plain(parameter) else state.get("master")
        if weight is None:
            weight = parameter.float()
            if "kahan_comp" in state:
                weight += state["kahan_comp"]
        update(weight, grad, state, group)
        if weight is parameter:
            increment_version(parameter)  # fused updates write past the counter by which engines see new weights
            return
        if isinstance(parameter, QuantisedWeight):
            parameter.quantise_(weight)
            return
        if self.keep == "bf16_stochastic_round":
            generator = torch.Generator(parameter.device)
            numbers = self.seed, int(state["step"]), self.param_groups.index(group), index
            generator.manual_seed(hash(numbers) & (1 << 63) - 1)  # of integers: the same in every process
            parameter.copy_(stochastic_round(weight, generator))
            return
        parameter.copy_(weight)
        if "kahan_comp" in state:
            state["kahan_comp"].copy_(weight - parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps its dtype: torch would round the state to that of the parameter."""
        super().load_state_dict(state_dict)
        for index, parameter in enumerate(self._parameters()):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][name] = value.to(parameter.device)


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether the parameter is updated itself."""
    return parameter.dtype == torch.float32 and not isinstance(parameter, QuantisedWeight)


def _scaler(device: torch.device, sharded: bool) -> torch.amp.GradScaler:
    """One that halves its scale in all processes where the gradients of one overflow, if they have different ones."""
    if not sharded:
        return torch.amp.GradScaler(device.type)
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    return ShardedGradScaler(device.type)


class GradientStep:
    """What lies between a loss and new weights: loss scaling, backward, reduction over processes, clipping, step.

    Args:
        forward: what data parallel wraps.
        optimizer: of accelerate.
        sharded: parameters that are not averaged by data parallel, each of which has a part on this process.
        section: of the recipe; its ``max_grad_norm`` bounds the norm.
        loss_scaling: as ``torch.amp.GradScaler``: a step whose gradients overflow is skipped and the scale halved.

    Attributes:
        updated: whether the last update moved the weights.
        skipped: updates of the run that did not, because their loss or gradients were not finite.
    """

    averages: ClassVar[bool] = True
    """Whether processes have gradients of different examples."""

    def __init__(
        self,
        accelerator: Accelerator,
        forward: nn.Module,
        optimizer: Any,
        sharded: ShardedParameters | None,
        section: OptimizerSection,
        loss_scaling: bool = False,
    ) -> None:
        self._accelerator, self._forward, self._optimizer = accelerator, forward, optimizer
        self._sharded, self._section = sharded, section
        self.scaler = _scaler(accelerator.device, sharded is not None) if loss_scaling else None
        self.updated, self.skipped, self._in_a_row = True, 0, 0
        # Data parallel would reduce 16-bit gradients as they are, and only those of the last micro-batch's backward.
        in_float32 = isinstance(optimizer.optimizer, LowPrecisionAdamW)
        if in_float32:
            # Again, for moving a model to a device makes its quantised weights anew.
            optimizer.optimizer.add_gradients_in_float32()
        apart = {id(p) for p in sharded.parameters.values()} if sharded is not None else set()
        parameters = [p for p in forward.parameters() if p.requires_grad and id(p) not in apart]
        averaged = in_float32 and self.averages and accelerator.num_processes > 1
        self._reduced = parameters if averaged else None

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch: gradients are averaged over the processes with the last one of an update."""
        if last and self._reduced is None:
            return nullcontext()
        return cast(AbstractContextManager[None], self._accelerator.no_sync(self._forward))

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch's loss."""
        self._accelerator.backward(loss if self.scaler is None else self.scaler.scale(loss))

    def finish(self, step: int, loss: Tensor) -> Tensor:
        """Updates the weights in ``step`` by the gradients so far, which are then gone; returns their norm.

        Where the norm, or the ``loss`` in any process, is not finite, weights and optimizer stay as they are, and
        ``skipped`` counts one more.

        Raises:
            ToolkitError: more than ``max_skipped_steps`` in a row are skipped. Those by which loss scaling finds its
                scale do not count.
        """
        for parameter in self._reduced or ():
            grad = torch.zeros_like(parameter, dtype=torch.float32) if parameter.grad is None else parameter.grad
            parameter.grad = cast(Tensor, self._accelerator.reduce(grad, "mean"))
        if self.scaler is not None:
            self.scaler.unscale_(self._optimizer.optimizer)
        norm = self._clip()
        self.updated = bool(torch.isfinite(norm)) and self._finite_everywhere(loss)
        self._count_skipped(step, loss, norm)
        if self.updated and self.scaler is None:
            self._optimizer.step()
        elif self.updated and self.scaler is not None:
            self.scaler.step(self._optimizer.optimizer)
        if self.scaler is not None:
            self.scaler.update()
        self._optimizer.zero_grad()
        return norm

    def _count_skipped(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Count a step that is not ``updated``. Raises ToolkitError where there are too many in a row."""
        if self.updated:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += self.scaler is None or self.scaler.get_scale() <= 1.0
        if self._in_a_row > self._section.max_skipped_steps:
            raise ToolkitError(self._not_finite(step, loss, norm))

    def _finite_everywhere(self, loss: Tensor) -> bool:
        """Whether the loss is finite in all processes, which must all skip a step or none."""
        bad = torch.isfinite(loss).logical_not().float()
        if self._accelerator.num_processes > 1:
            bad = cast(Tensor, self._accelerator.reduce(bad, "sum"))
        return not bad

    def _not_finite(self, step: int, loss: Tensor, norm: Tensor) -> str:
        rate, most = self._section.learning_rate, self._section.max_skipped_steps
        which = f"The gradient of step {step} is" if not most else f"The gradients of {most + 1} steps up to {step} are"
        return (
            f"{which} not finite (loss {loss.item():.4g}, norm {norm.item():.4g}); lower optimizer.learning_rate, "
            f"which is {rate}, or allow more such steps in a row by optimizer.max_skipped_steps, which is {most}."
        )

    def _clip(self) -> Tensor:
        limit = math.inf if self._section.max_grad_norm is None else self._section.max_grad_norm
        if self._sharded is not None:
            self._sharded.reduce()
            return self._sharded.clip(self._forward.parameters(), limit)
        return cast(Tensor, self._accelerator.clip_grad_norm_(self._forward.parameters(), limit))

    def metrics(self) -> dict[str, float]:
        """How many updates were skipped so far, and with loss scaling the scale."""
        scale = {} if self.scaler is None else {"loss_scale": self.scaler.get_scale()}
        return {"skipped_steps": self.skipped, **scale}

    def state_dict(self) -> dict[str, Any]:
        """Counts and the state of the loss scale, as JSON."""
        scale = {} if self.scaler is None else {"scaler": self.scaler.state_dict()}
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, **scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        if self.scaler is not None:
            self.scaler.load_state_dict(dict(state["scaler"]))
