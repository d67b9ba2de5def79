"""The interface of an objective, and the run's context that it gets."""

import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, cast

from toolkit.config import Recipe
from toolkit.config.objective import ObjectiveSection
from toolkit.errors import ToolkitError
from toolkit.files import write_atomic
from toolkit.training.details import StepDetails
from toolkit.training.signals import StopRequest
from toolkit.training.tasks import ProblemStream, Task

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor
    from transformers import PreTrainedModel

    from toolkit.training.model import RaggedModel
    from toolkit.training.reference import ReferenceSync
    from toolkit.training.tokenizer import Tokenizer

CHECKED_PROBLEMS = 64
"""Problems of a task that are looked at before the first step."""
DATA_REPORT = "data_report.txt"
TOKENIZER_PROBLEMS = 2000
"""Problems of a task whose text a tokenizer is trained on."""

Metrics = dict[str, Any]
S = TypeVar("S", bound=ObjectiveSection)
T = TypeVar("T")


@dataclass(frozen=True)
class RunContext:
    """The run around an objective.

    Attributes:
        model: patched and unwrapped.
        initial_model: makes the model that training started from again, unpatched.
        nested_run: trains another recipe first, inside of this run; returns the folder of its last checkpoint.
        folder: the run's.
        log: prints a line on the main process.
        stop: whether a signal has asked the run to stop.
        gathered: inside of what it returns this process computes with the whole model, where that is sharded over
            processes: all must enter it, and inside they need not do the same, unless they have the same data.
        whole: inside of what it returns every process has all weights; all must enter it.
        averaged: inside of what it returns the model has the moving average of ``train.ema_decay``.
        same_data: whether all processes train on the same examples, as one would, each with a part of the model.
    """

    recipe: Recipe
    accelerator: "Accelerator"
    tokenizer: "Tokenizer"
    model: "RaggedModel"
    initial_model: "Callable[[], PreTrainedModel]"
    nested_run: Callable[[Recipe], Path]
    folder: Path
    log: Callable[[str], None]
    stop: StopRequest = field(default_factory=StopRequest)
    gathered: Callable[[], AbstractContextManager[None]] = nullcontext
    whole: Callable[[], AbstractContextManager[None]] = nullcontext
    averaged: Callable[[], AbstractContextManager[None]] = nullcontext
    same_data: bool = False

    @cached_property
    def details(self) -> StepDetails:
        """What is written of a step beside its metrics."""
        return StepDetails(self.recipe.log)

    @property
    def device(self) -> "torch.device":
        device: torch.device = self.accelerator.device
        return device

    @property
    def rank(self) -> int:
        """Of this process among those that have different data."""
        return 0 if self.same_data else int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Processes that have different data."""
        return 1 if self.same_data else int(self.accelerator.num_processes)

    def sum_tensor(self, tensor: "Tensor") -> "Tensor":
        """The sum over the processes that have different data."""
        return tensor if self.world_size == 1 else cast("Tensor", self.accelerator.reduce(tensor, "sum"))

    def reduce_sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each number over the processes that have different data."""
        import torch

        given = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        total: list[float] = self.sum_tensor(given).tolist()
        return total

    def gather_objects(self, value: Any) -> list[Any]:
        """The value, which can be pickled, of each process that has different data, in their order."""
        from accelerate.utils import gather_object

        return [value] if self.world_size == 1 else list(gather_object([value]))

    def agreed(self, make: "Callable[[], T]") -> "T":
        """What ``make`` returns; where all processes have the same data, in the first of them, which alone calls it.

        Rewards may be random, and models that learn from different ones would come apart.
        """
        if not self.same_data or self.accelerator.num_processes == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found = [make(), None]
            except ToolkitError as error:
                found = [None, str(error)]
        value, problem = broadcast_object_list(found)
        if problem is not None:
            raise ToolkitError(problem)
        return cast("T", value)

    def reduce_max(self, value: int) -> int:
        """The largest of a number over all processes."""
        import torch

        if self.accelerator.num_processes == 1:
            return value
        gathered = cast("Tensor", self.accelerator.gather(torch.tensor([value], device=self.device)))
        return int(gathered.max())


@dataclass
class MetricAccumulator:
    """Numbers of a step, summed along the way and over the processes at its end."""

    values: dict[str, float] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + float(value)

    def take(self, context: RunContext) -> dict[str, float]:
        """The sums over all processes, which must have added the same names; the next step starts from nothing."""
        taken, self.values = dict(sorted(self.values.items())), {}
        return dict(zip(taken, context.reduce_sum(list(taken.values()))))


class Objective(ABC, Generic[S]):
    """A kind of run: its data, its loss and its held-out measure. The loop owns all else.

    A subclass names its section, which registers it: ``class GRPO(OnPolicyObjective[GRPOSection])``, or, derived from a
    finished one, ``class SLiC(DPO, section=SLiCSection)``. ``__init__`` reads the data, before there is a tokenizer or
    a model; ``bind`` brings those. Bad input raises ToolkitError in either.
    """

    primary_metric: ClassVar[str] = "loss"
    """The metric of a step that is shown and plotted."""
    eval_on_start: ClassVar[bool] = True
    """Whether ``evaluate`` also runs before the first step."""
    eval_metric: str = "eval_loss"
    """The held-out metric by which checkpoints are compared, where the recipe names none."""
    head: ClassVar[Literal["tokens", "score", "token_classes"]] = "tokens"
    """Whether the model predicts tokens, has one score a sequence, or two classes for each token."""
    fingerprint: str
    """Of the data: a position in it means something only for the same data."""
    synced: "ReferenceSync | None" = None
    """Moves a reference towards the model; ``bind`` sets it where the recipe asks for that."""
    data_report: str = ""
    """What a look at the data has found, for the run's folder; ``bind`` sets it."""

    def __init_subclass__(cls, section: type[ObjectiveSection] | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        arguments = [arg for base in cls.__dict__.get("__orig_bases__", ()) for arg in typing.get_args(base)]
        for found in (section, *arguments):
            if isinstance(found, type):
                _CLASSES[found] = cls

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.section = cast(S, recipe.objective)

    @abstractmethod
    def describe(self) -> str:
        """A line on the data."""

    def data_changed(self) -> str:
        """Says that ``fingerprint`` is another one, as the beginning of a sentence."""
        return "objective.data_files has other lines"

    @abstractmethod
    def texts(self) -> Iterable[str]:
        """What a tokenizer is trained on, where the recipe names none."""

    def bind(self, context: RunContext) -> None:
        """Take the run's other parts."""
        self.context = context

    @abstractmethod
    def updates(self, step: int) -> Iterator[Sequence[Any]]:
        """The optimizer updates of a step (counted from 0), most often one: each a list of micro-batches.

        An update is asked for when the one before it is done. All processes give as many updates, and as many
        micro-batches in each.
        """

    @abstractmethod
    def loss(self, forward: Callable[..., Any], micro: Any) -> "Tensor":
        """A micro-batch's part of its update's loss: parts are summed, and averaged over the processes.

        ``forward`` is the model as ``RaggedModel.forward``.
        """

    @abstractmethod
    def rows(self, micro: Any) -> int:
        """Tokens of a micro-batch's samples, shared ones once for each sample; 0 for a micro-batch of padding."""

    @abstractmethod
    def finish(self) -> tuple[int, dict[str, float]]:
        """(tokens that the step trained on, what else it logs), over all processes."""

    @abstractmethod
    def evaluate(self) -> Metrics:
        """The held-out measure, names with the prefix ``eval_``; the processes share the work and all get it."""

    @abstractmethod
    def show(self, before: Metrics | None, after: Metrics) -> None:
        """Print the held-out measure."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """This process's position in the data, as JSON."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""

    @abstractmethod
    def follow(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue where another number of processes has taken ``state_dict``, in the order of their ranks."""

    def stepped(self, step: int) -> None:
        """After step ``step``, counted from 1; all processes call it."""
        if self.synced is not None:
            self.synced.stepped(step)

    def tensors(self) -> "dict[str, Tensor]":
        """What a checkpoint holds of the objective beside its position; every process has the same."""
        return {} if self.synced is None else self.synced.tensors()

    def load_tensors(self, tensors: "dict[str, Tensor]") -> None:
        """Continue with what ``tensors`` gave."""
        if self.synced is not None:
            self.synced.load(tensors)

    def write_report(self, folder: Path) -> None:
        """Leave ``data_report`` in the run's folder."""
        if self.data_report:
            write_atomic(folder / DATA_REPORT, self.data_report + "\n")

    def close(self) -> None:
        """Free what the objective holds."""


_CLASSES: dict[type, type[Objective[Any]]] = {}


def make_objective(recipe: Recipe) -> Objective[Any]:
    """The objective that the recipe's section ``objective`` describes, with its data."""
    return _CLASSES[type(recipe.objective)](recipe)


def task_texts(task: Task, seed: int, val_set_size: float) -> list[str]:
    """What a tokenizer is trained on for a task whose share ``val_set_size`` is held out."""
    problems = ProblemStream(task, seed, val_set_size).take(TOKENIZER_PROBLEMS)
    return [problem.prompt + problem.solution for problem in problems]


def divided(what: str, count: int, world_size: int) -> int:
    """``count`` split evenly over the processes, or a ToolkitError."""
    if count % world_size:
        raise ToolkitError(f"{what} must be a multiple of the {world_size} processes, got {count}.")
    return count // world_size
