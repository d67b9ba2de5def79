"""The optimizers of recipes: torch's and transformers', and those of 16-bit weights and 8-bit moments."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import transformers

from toolkit.config.optimization import OptimizerSection
from toolkit.training.precision import LowPrecisionAdamW, Masters


def make_optimizer(
    model: torch.nn.Module, section: OptimizerSection, masters: Masters | None = None, seed: int = 0
) -> torch.optim.Optimizer:
    """The optimizer of a section over the model's parameters: matrices decay, vectors do not. AdamW is fused.

    Args:
        masters: with mixed precision, of parameters that were rounded to 16 bits, their values in float32. None: 16-bit
            weights are trained as the section says.
        seed: of stochastic rounding.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = section.adam_beta1, section.adam_beta2
    low = masters is not None or any(parameter.itemsize == 2 for parameter in trained)
    if low or section.optim == "adamw_8bit":
        keep = "master" if masters is not None else section.kept_of_rounding
        return LowPrecisionAdamW(
            groups, lr=section.learning_rate, betas=betas, eps=section.adam_epsilon, keep=keep, masters=masters,
            seed=seed, optim=section.optim,
        )  # fmt: skip
    if section.optim == "adafactor":
        return Adafactor(groups, lr=section.learning_rate, scale_parameter=False, relative_step=False)  # type: ignore[no-untyped-call]
    if section.optim == "sgd":
        return torch.optim.SGD(groups, lr=section.learning_rate, momentum=section.momentum)
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
    adamw = partial(torch.optim.AdamW, lr=section.learning_rate, betas=betas, eps=section.adam_epsilon, fused=fused)
    if section.optim == "muon":
        inner = {id(parameter) for parameter in _inner_matrices(model)}
        rest = [parameter for parameter in matrices if id(parameter) not in inner]
        of_muon = [parameter for parameter in matrices if id(parameter) in inner]
        others = [{"params": rest, "weight_decay": section.weight_decay}, *groups[1 if matrices else 0 :]]
        others = [group for group in others if group["params"]]
        muon = partial(torch.optim.Muon, momentum=section.momentum, adjust_lr_fn="match_rms_adamw")
        parts: list[torch.optim.Optimizer] = [adamw(others)] if others else []
        if of_muon:
            parts.insert(0, muon(of_muon, lr=section.learning_rate, weight_decay=section.weight_decay))
        return Together(parts)
    return adamw(groups)


def _inner_matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Matrices inside of layers: neither embeddings nor the head, which have a row for each token."""
    outer = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    outer += [one.get_output_embeddings() for one in model.modules() if isinstance(one, transformers.PreTrainedModel)]
    known = {id(parameter) for module in outer if module is not None for parameter in module.parameters()}
    return [p for p in model.parameters() if p.requires_grad and p.dim() == 2 and id(p) not in known]


class Adafactor(transformers.optimization.Adafactor):
    """Adafactor (Shazeer and Stern, 2018) as transformers' ``Trainer`` configures it, resumed exactly."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's; numbers are tensors."""
        found = super().state_dict()
        of_tensors = {
            index: {name: torch.as_tensor(value) for name, value in state.items()}
            for index, state in found["state"].items()
        }
        return {**found, "state": of_tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the number of steps is an integer again."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["step"] = int(state["step"])


class Together(torch.optim.Optimizer):
    """Several optimizers as one, with the groups and the state of all of them.

    Args:
        parts: over different parameters.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let each part read and write the groups and the state of the whole."""
        first = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[first : first + count]
            part.state = self.state
            first += count

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each."""
        assert closure is None
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, for all parts."""
        super().load_state_dict(state_dict)
        self._share()
