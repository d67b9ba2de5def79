"""What the objectives on given examples share: a task's problems or a file's lines, and the position in them."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from toolkit.config import Recipe
from toolkit.training.examples import JsonlDataset, LineStream, Stream
from toolkit.training.objectives.base import Objective, RunContext, task_texts
from toolkit.training.tasks import ProblemStream, make_task


class OfflineObjective(Objective):
    """An objective whose section has ``task`` or ``data``. ``stream``, which ``bind`` sets, is its position in them.

    fields: the sets of fields that a line may have. of_task, of_file: what the examples are called.
    """

    fields: ClassVar[Sequence[Mapping[str, type]]]
    of_task: ClassVar[str]
    of_file: ClassVar[str]
    stream: Any  # a Stream, or what packs one

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        section: Any = recipe.objective
        self.task = make_task(section.task) if section.task is not None else None
        self.share: float = section.evaluation.held_out
        self.lines = JsonlDataset(section.data, self.share, self.fields) if section.data is not None else None
        self.fingerprint = self.lines.fingerprint if self.lines is not None else repr(section.task)
        self._task_fields = section.task

    def describe(self) -> str:
        if self.lines is not None:
            return f"{len(self.lines.train)} {self.of_file} to train on, {len(self.lines.held_out)} held out"
        return f"{self.of_task} of {self._task_fields}, {self.share:.0%} of them held out"

    def texts(self) -> Iterable[str]:
        if self.task is not None:
            return task_texts(self.task, self.recipe.seed, self.share)
        assert self.lines is not None
        return [self.text_of(line) for line in self.lines.train]

    @staticmethod
    @abstractmethod
    def text_of(line: dict[str, Any]) -> str:
        """All text of a line."""

    def sources(self, setting: RunContext) -> Stream:
        """This process's share of the problems or lines, from the start."""
        if self.task is not None:
            return ProblemStream(self.task, self.recipe.seed, self.share, rank=setting.rank, world=setting.world)
        assert self.lines is not None
        return LineStream(self.lines.train, self.recipe.seed, rank=setting.rank, world=setting.world)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)
