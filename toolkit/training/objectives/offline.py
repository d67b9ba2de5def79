"""What the objectives on given examples share: a task's problems or a file's lines, how they become examples."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from toolkit.chat import ChatTokenizer, dropped_messages, hidden_parts, hidden_tools
from toolkit.config import Recipe
from toolkit.config.objective import OfflineSection
from toolkit.errors import ToolkitError
from toolkit.training import data_report, formats
from toolkit.training.examples import LineStream, Stream, check_misses
from toolkit.training.given import GivenLines, open_lines
from toolkit.training.jsonl import BadLine, Line, bad_lines_error, shown
from toolkit.training.objectives.base import CHECKED_PROBLEMS, Objective, RunContext, task_texts
from toolkit.training.prepared import PreparedLines, settings_of
from toolkit.training.preparing import Outcome, TooLong
from toolkit.training.rows import text_of_row
from toolkit.training.tasks import Problem, ProblemStream, make_task
from toolkit.training.tokenizer import set_chat_template

O = TypeVar("O", bound=OfflineSection)


_NOT_OF_TOKENS = (
    "task", "data_files", "datasets", "eval_datasets", "evaluation", "rollout", "warmup", "on_bad_lines",
    "dataset_prepared_path", "max_check_samples",
)  # fmt: skip
"""Fields of a section that a line's tokens do not follow from."""


class OfflineObjective(Objective[O]):
    """An objective whose section has ``task`` or ``data_files``. ``bind`` sets ``stream``, the position in them.

    Attributes:
        formats: the sets of fields that a line may have.
        example_type: makes an example of its fields.
        of_task, of_file: what the examples are called.
        chat: tokenises.
        lengths: of the packed examples of each line; none unless the recipe counts epochs.
    """

    formats: ClassVar[Sequence[formats.Format]]
    example_type: ClassVar[Callable[..., Any]]
    of_task: ClassVar[str]
    of_file: ClassVar[str]
    stream: Any  # a Stream, or what packs one
    chat: ChatTokenizer
    lengths: Mapping[int, Sequence[int]]
    _prepared: PreparedLines | None = None

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        section = self.section
        self.task = make_task(section.task) if section.task is not None else None
        self.val_set_size: float = section.evaluation.val_set_size
        self.dataset = open_lines(section, self.check_line)
        self.fingerprint = self.dataset.fingerprint if self.dataset is not None else repr(section.task)

    def check_line(self, line: Mapping[str, Any]) -> None:
        """Raise ToolkitError for an object that is no example."""
        self.fields(line)

    def fields(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """A line's texts or messages by field. Raises ToolkitError for an object that is no example."""
        return formats.read(line, self.formats)

    def describe(self) -> str:
        if self.dataset is not None:
            return self.dataset.describe(self.of_file)
        return f"{self.of_task} of {self.section.task}, {self.val_set_size:.0%} of them held out"

    def texts(self) -> Iterable[str]:
        if self.task is not None:
            return task_texts(self.task, self.recipe.seed, self.val_set_size)
        assert self.dataset is not None
        return (formats.text_of(self.fields(line.value)) for line in self.dataset.train)

    def chat_tokenizer(self, eos_token_ids: Iterable[int]) -> ChatTokenizer:
        """What tokenises, with the options of the section."""
        return ChatTokenizer(
            self.context.tokenizer,
            chat_template_kwargs=self.section.chat_template_kwargs,
            eos_token_ids=eos_token_ids,
        )

    def bind(self, context: RunContext) -> None:
        from toolkit.training.model import eos_token_ids

        super().bind(context)
        section = self.section
        set_chat_template(context.tokenizer, section.chat_template)
        if self.dataset is not None and not context.tokenizer.chat_template and self._has_messages(self.dataset):
            raise ToolkitError(
                f"objective.chat_template must be given for messages, as in {self.dataset.name}, when the tokenizer "
                "has no template."
            )
        self.chat = self.chat_tokenizer(eos_token_ids(context.model.model))
        if section.dataset_prepared_path is not None and self.dataset is not None:
            values = {name: value for name, value in section.model_dump().items() if name not in _NOT_OF_TOKENS}
            settings = settings_of(context.tokenizer, {**values, "max_length": self.recipe.train.max_length})
            self._prepared = PreparedLines(section.dataset_prepared_path, settings, type(self).example_type)

    def _has_messages(self, dataset: GivenLines) -> bool:
        """Whether the first line of a file, or of any dataset, has messages."""
        firsts = (line.value for line in dataset.firsts())
        return any(formats.conversations(self.fields(line)) for line in firsts)

    @abstractmethod
    def prepare(self, source: Problem | Line) -> Outcome:
        """The examples of a problem or a line. Raises ToolkitError for a line that cannot be trained on."""

    @abstractmethod
    def shown(self, example: Any) -> tuple[list[int], list[bool]]:
        """An example's tokens, and whether each counts."""

    def prepared(self, source: Problem | Line) -> Outcome:
        """``prepare``, or what it has given for such a line before."""
        if self._prepared is None or not isinstance(source, Line):
            return self.prepare(source)
        key = f"{sorted(self.chat.eos_token_ids)} {text_of_row(source.value)}"
        return self._prepared.outcome(key, lambda: self.prepare(source))

    def length(self, example: Any) -> int:
        """Tokens of an example, as it is shown."""
        return len(self.shown(example)[0])

    def examples(self, source: Problem | Line) -> list[Any]:
        """``prepare`` by the recipe's policies: none of a line that is skipped."""
        try:
            return self.prepared(source).examples
        except ToolkitError as error:
            if self.dataset is None or not isinstance(source, Line):
                raise
            if isinstance(error, TooLong) or self.section.on_bad_lines == "error":
                raise bad_lines_error(self.dataset.name, [BadLine(source.number, str(error), source.path)]) from None
            return []

    def check_data(self) -> None:
        """Before the first step: count, report, raise by the recipe's policies, complete the list of EOS tokens."""
        context, section = self.context, self.section
        most = section.max_check_samples
        if self.dataset is None:
            assert self.task is not None
            what = self.of_task
            sources: Sequence[Any] = ProblemStream(self.task, self.recipe.seed, self.val_set_size).take(
                min(most or CHECKED_PROBLEMS, CHECKED_PROBLEMS)
            )
        else:
            what, sources = "lines", self.dataset.train
        total = min(most or len(sources), len(sources))
        report = data_report.check(
            (sources[at] for at in range(total)), total, self._prepare_and_look, context, what, self.length
        )
        if self.dataset is not None:
            held_out = self.dataset.held_out[: section.evaluation.max_eval_samples]
            report.add_bad(data_report.check(held_out, len(held_out), self.prepared, context, "held-out lines"))
            data_report.raise_by_policy(report, self.dataset.name, section.on_bad_lines)
            report.sources += len(self.dataset.bad)
            report.bad = sorted([*report.bad, *self.dataset.bad])
        if not report.counts["examples"]:
            if len(report.bad) == report.sources:
                raise ToolkitError(
                    f"objective must have an example to train on, got none in {report.sources} {what} "
                    f"({shown(report.bad)})."
                )
            why = f" ({shown(report.bad)})" if report.bad else ""
            raise ToolkitError(
                f"objective must have an example whose completion begins within train.max_length, which is "
                f"{self.recipe.train.max_length}, got none in {report.sources} {what}{why}; raise it."
            )
        notes = self._complete_eos_list(report)
        if self._prepared is not None:
            self._prepared.commit()
            found, made = map(int, context.reduce_sum([self._prepared.found, self._prepared.made]))
            notes.append(f"tokenised: {made:,} lines; {found:,} more read from {section.dataset_prepared_path}")
        if self.dataset is not None and self.dataset.streamed:
            notes.append("note: later lines of the stream are checked as they come")
        elif total < len(sources):
            notes.append(f"note: {len(sources) - total:,} more lines are checked as they come (max_check_samples)")
        self.lengths = report.lengths or {}
        example = self.shown(report.first) if report.first is not None else None
        self.data_report = data_report.written(
            report, what, self.recipe.train.max_length, context.tokenizer, notes, example
        )
        context.log(
            data_report.for_terminal(
                data_report.written(
                    report, what, self.recipe.train.max_length, context.tokenizer, notes, example, data_report.marks()
                )
            )
        )

    def num_steps(self, epochs: float) -> int:
        """Steps of so many passes over the lines. After ``bind``."""
        lines = self.line_streams(range(self.num_lines))[0].lines_per_epoch * self.context.world_size
        return max(math.ceil(epochs * lines / self.lines_per_step), 1)

    @property
    def lines_per_step(self) -> int:
        """Over all processes, of an objective that takes a number of them."""
        raise NotImplementedError

    @property
    def num_lines(self) -> int:
        """Lines to train on."""
        assert self.dataset is not None
        return len(self.dataset.train)

    def line_streams(self, lines: Sequence[Any]) -> list[LineStream]:
        """The shares of all processes of the lines, or of what stands for them."""
        assert self.dataset is not None
        world_size = self.context.world_size
        return [
            LineStream(lines, self.recipe.seed, rank=rank, world_size=world_size, shares=self.dataset.shares)
            for rank in range(world_size)
        ]

    def _prepare_and_look(self, source: Problem | Line) -> Outcome:
        """``prepare``, and whether the template leaves messages out; the latter of the first lines only."""
        outcome = self.prepared(source)
        if isinstance(source, Line) and source.number <= CHECKED_PROBLEMS:
            tools, own = formats.options(source.value)
            variables = {**(self.section.chat_template_kwargs or {}), **(own or {})}
            tokenizer = self.context.tokenizer
            for messages in formats.conversations(self.fields(source.value)):
                dropped = dropped_messages(tokenizer, messages, tools, chat_template_kwargs=variables)
                hidden = hidden_tools(tokenizer, messages, tools, chat_template_kwargs=variables)
                parts = hidden_parts(tokenizer, messages, tools, chat_template_kwargs=variables)
                outcome.counts.update(
                    dropped_messages=bool(dropped), hidden_tools=bool(hidden), hidden_parts=bool(parts) and not dropped
                )
        return outcome

    def _complete_eos_list(self, report: data_report.DataReport) -> list[str]:
        """Let generation stop at the special tokens that end turns; what the report says of the list."""
        from toolkit.training.model import add_eos_token_ids, eos_token_ids

        model, tokenizer = self.context.model.model, self.context.tokenizer
        missing = [token for token in report.turn_ends if token is not None]
        add_eos_token_ids(model, missing)
        if missing:
            self.chat = self.chat_tokenizer(eos_token_ids(model))

        def names(ids: Iterable[int]) -> str:
            return ", ".join(f"{token} ({at})" for at, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids))))

        added = f"; added, because turns end with it: {names(sorted(missing))}" if missing else ""
        return [f"EOS tokens: {names(eos_token_ids(model))}{added}"]

    def sources(self, context: RunContext) -> Stream:
        """This process's share of the problems or lines, from the start."""
        rank, world_size = context.rank, context.world_size
        if self.task is not None:
            return ProblemStream(self.task, self.recipe.seed, self.val_set_size, rank=rank, world_size=world_size)
        assert self.dataset is not None
        return self.dataset.stream(self.recipe.seed, rank, world_size)

    def held_out_sources(self) -> Sequence[Problem | Line]:
        """Problems or lines that are never trained on, at most ``evaluation.max_eval_samples``."""
        evaluation = self.section.evaluation
        if self.task is not None:
            stream = ProblemStream(self.task, 0, evaluation.val_set_size, held_out=True)
            return stream.take(evaluation.max_eval_samples)
        assert self.dataset is not None
        return self.dataset.held_out[: evaluation.max_eval_samples]

    def next_examples(self) -> list[Any]:
        """The examples of the next source that has any."""
        misses = 0
        while not (found := self.examples(self.stream.take(1)[0])):
            misses += 1
            check_misses(misses)
        return found

    def held_out_examples(self) -> tuple[list[Any], int]:
        """This process's held-out examples, and how many all have; none where there are too few sources."""
        context, sources = self.context, self.held_out_sources()
        mine = [one for source in sources[context.rank :: context.world_size] for one in self.examples(source)]
        (total,) = context.reduce_sum([len(mine)])
        return ([], 0) if len(sources) < context.world_size else (mine, int(total))

    def close(self) -> None:
        if self._prepared is not None:
            self._prepared.close()
            self._prepared = None
        super().close()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.stream.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)

    def follow(self, states: Sequence[dict[str, Any]]) -> None:
        self.stream.follow(states)
