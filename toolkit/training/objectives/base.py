"""What the loop asks of an objective, and what it lends to one."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from toolkit.config import Recipe
from toolkit.errors import ToolkitError
from toolkit.training.tasks import ProblemStream, Task

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from toolkit.training.model import RaggedModel
    from toolkit.training.tokenizer import Tokenizer

TOKENIZER_PROBLEMS = 2000
"""Problems of a task whose text a tokenizer is trained on."""


@dataclass(frozen=True)
class RunContext:
    """The run around an objective.

    model: patched, unwrapped. found: makes the model as training found it anew, unpatched. folder: the run's.
    child: trains another recipe first, inside of this run, and gives the folder of its last checkpoint.
    """

    recipe: Recipe
    accelerator: "Accelerator"
    tokenizer: "Tokenizer"
    model: "RaggedModel"
    found: "Callable[[], PreTrainedModel]"
    child: Callable[[Recipe], Path]
    folder: Path
    say: Callable[[str], None]

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums of numbers over the processes."""
        given = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        return cast(Tensor, self.accelerator.reduce(given, "sum")).tolist()

    def largest(self, value: int) -> int:
        """The largest of a number over the processes."""
        if self.world == 1:
            return value
        return int(self.accelerator.gather(torch.tensor([value], device=self.device)).max())


@dataclass
class MetricAccumulator:
    """Numbers of a step, added up on the way and over the processes at its end."""

    values: dict[str, float] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + float(value)

    def take(self, setting: RunContext) -> dict[str, float]:
        """The sums over all processes, which must have added the same names; the next step starts from nothing."""
        taken, self.values = dict(sorted(self.values.items())), {}
        return dict(zip(taken, setting.total(list(taken.values()))))


class Objective(ABC):
    """A kind of run: its data, its loss and its held-out measure. The loop owns all else.

    ``__init__`` reads the data, before there is a tokenizer or a model; ``bind`` brings those. Bad input raises
    ToolkitError in either.
    """

    headline: ClassVar[str] = "loss"
    """The figure of a step that is shown and plotted."""
    before: ClassVar[bool] = True
    """Whether ``evaluate`` also runs before the first step."""
    fingerprint: str
    """Of the data: a position in it means something only for the same data."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @abstractmethod
    def describe(self) -> str:
        """A line on the data."""

    @abstractmethod
    def texts(self) -> Iterable[str]:
        """What a tokenizer is trained on, where the recipe wants one made."""

    def bind(self, setting: RunContext) -> None:
        """Take the run's other parts."""
        self.setting = setting

    @abstractmethod
    def updates(self, step: int) -> Iterator[Sequence[Any]]:
        """The optimizer updates of a step (counted from 0), most often one: each a list of micro-batches.

        An update is asked for when the one before it is done. All processes give as many updates, and as many
        micro-batches in each.
        """

    @abstractmethod
    def loss(self, forward: Callable[..., Any], micro: Any) -> Tensor:
        """A micro-batch's part of its update's loss: parts are added up, and averaged over the processes.

        ``forward`` is the model as ``RaggedModel.forward``.
        """

    @abstractmethod
    def rows(self, micro: Any) -> int:
        """Tokens that a micro-batch's samples have, shared ones once for each sample; 0 where it only fills up."""

    @abstractmethod
    def finish(self) -> tuple[int, dict[str, float]]:
        """(tokens that the step trained on, what else it logs), over all processes."""

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """The held-out measure; the processes share the work and all get it."""

    @abstractmethod
    def show(self, before: dict[str, Any] | None, after: dict[str, Any]) -> None:
        """Print the held-out measure."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """This process's position in the data, as JSON."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""

    def close(self) -> None:  # noqa: B027
        """Free what the objective holds beside the model."""


def task_texts(task: Task, seed: int, share: float) -> list[str]:
    """What a tokenizer is trained on for a task whose ``share`` is held out."""
    problems = ProblemStream(task, seed, share).take(TOKENIZER_PROBLEMS)
    return [problem.prompt + problem.solution for problem in problems]


_KINDS = {
    "pretrain": "toolkit.training.objectives.pretrain.Pretrain",
    "sft": "toolkit.training.objectives.sft.Supervised",
    "dpo": "toolkit.training.objectives.dpo.Preference",
    "grpo": "toolkit.training.objectives.grpo.GRPO",
    "distill": "toolkit.training.objectives.distill.Distillation",
}


def make_objective(recipe: Recipe) -> Objective:
    """The objective that the recipe's section ``objective`` describes, with its data."""
    module, _, name = _KINDS[recipe.objective.kind].rpartition(".")
    return getattr(importlib.import_module(module), name)(recipe)


def divided(what: str, count: int, world: int) -> int:
    """``count`` split evenly over the processes, or a ToolkitError."""
    if count % world:
        raise ToolkitError(f"{what} is {count}; it must be a multiple of the {world} processes.")
    return count // world
