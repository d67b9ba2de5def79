"""What the objectives on given examples share: a task's problems or a file's lines, and the position in them."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from toolkit.config import Recipe
from toolkit.config.objective import OfflineSection
from toolkit.training.examples import JsonlDataset, LineStream, Stream
from toolkit.training.objectives.base import Objective, RunContext, task_texts
from toolkit.training.tasks import ProblemStream, make_task

O = TypeVar("O", bound=OfflineSection)


class OfflineObjective(Objective[O]):
    """An objective whose section has ``task`` or ``data_files``. ``bind`` sets ``stream``, the position in them.

    Attributes:
        fields: the sets of fields that a line may have.
        of_task, of_file: what the examples are called.
    """

    fields: ClassVar[Sequence[Mapping[str, type]]]
    of_task: ClassVar[str]
    of_file: ClassVar[str]
    stream: Any  # a Stream, or what packs one

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        section = self.section
        self.task = make_task(section.task) if section.task is not None else None
        self.val_set_size: float = section.evaluation.val_set_size
        self.dataset: JsonlDataset | None = None
        if section.data_files is not None:
            self.dataset = JsonlDataset(section.data_files, self.val_set_size, self.fields)
        self.fingerprint = self.dataset.fingerprint if self.dataset is not None else repr(section.task)

    def describe(self) -> str:
        if self.dataset is not None:
            return f"{len(self.dataset.train)} {self.of_file} to train on, {len(self.dataset.held_out)} held out"
        return f"{self.of_task} of {self.section.task}, {self.val_set_size:.0%} of them held out"

    def texts(self) -> Iterable[str]:
        if self.task is not None:
            return task_texts(self.task, self.recipe.seed, self.val_set_size)
        assert self.dataset is not None
        return [self.text_of(line) for line in self.dataset.train]

    @staticmethod
    @abstractmethod
    def text_of(line: dict[str, Any]) -> str:
        """All text of a line."""

    def sources(self, context: RunContext) -> Stream:
        """This process's share of the problems or lines, from the start."""
        rank, world_size = context.rank, context.world_size
        if self.task is not None:
            return ProblemStream(self.task, self.recipe.seed, self.val_set_size, rank=rank, world_size=world_size)
        assert self.dataset is not None
        return LineStream(self.dataset.train, self.recipe.seed, rank=rank, world_size=world_size)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.stream.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)
