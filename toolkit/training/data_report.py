"""The check of training data before the first step, and the report that it prints and leaves in the run's folder."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from toolkit.errors import ToolkitError
from toolkit.training.jsonl import BadLine, Line, bad_lines_error, shown
from toolkit.training.preparing import Outcome, TooLong
from toolkit.training.progress import counted

if TYPE_CHECKING:
    from toolkit.training.objectives.base import RunContext

EXAMPLE_CHARACTERS = 1200
BEGIN, END = ">>>", "<<<"
"""Around text that counts, in the example shown."""


@dataclass
class DataReport:
    """What a pass over the data has seen, over all processes after ``gather``."""

    sources: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    turn_ends: Counter[int | None] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    """How many examples have so many tokens."""
    bad: list[BadLine] = field(default_factory=list)
    too_long: list[BadLine] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    lengths: dict[int, list[int]] | None = None
    """Of the examples of each source, by its index; None where nobody wants them."""
    first: Any = None
    first_number: int | None = None

    def add(
        self, source: Any, prepare: Callable[[Any], Outcome], index: int, length: Callable[[Any], int] | None = None
    ) -> None:
        """One more source of examples."""
        self.sources += 1
        number = source.number if isinstance(source, Line) else self.sources
        try:
            outcome = prepare(source)
        except ToolkitError as error:
            (self.too_long if isinstance(error, TooLong) else self.bad).append(
                BadLine(number, str(error), source.path if isinstance(source, Line) else "")
            )
            return
        if self.lengths is not None:
            self.lengths[index] = outcome.lengths
        self.counts += outcome.counts
        self.turn_ends += outcome.turn_ends
        if length is not None:
            self.sizes.update(map(length, outcome.examples))
        if not outcome.examples:
            self.dropped.append(number)
        elif self.first is None:
            self.first, self.first_number = outcome.examples[0], number

    def add_bad(self, other: "DataReport") -> None:
        """Take over what another pass, which is not counted, has found wrong."""
        self.bad = sorted([*self.bad, *other.bad])
        self.too_long = sorted([*self.too_long, *other.too_long])
        self.sources += len(other.bad)

    def gather(self, context: "RunContext") -> None:
        """Bring together what the processes have seen."""
        if context.world_size == 1:
            return
        parts: list[DataReport] = context.gather_objects(self)
        self.sources = sum(part.sources for part in parts)
        self.counts = sum((part.counts for part in parts), Counter())
        self.turn_ends = sum((part.turn_ends for part in parts), Counter())
        self.sizes = sum((part.sizes for part in parts), Counter())
        if self.lengths is not None:
            self.lengths = {index: one for part in parts for index, one in (part.lengths or {}).items()}
        for name in ("bad", "too_long", "dropped"):
            setattr(self, name, sorted(one for part in parts for one in getattr(part, name)))
        shown_by = next((part for part in parts if part.first is not None), self)
        self.first, self.first_number = shown_by.first, shown_by.first_number


def check(
    sources: Iterable[Any],
    total: int,
    prepare: Callable[[Any], Outcome],
    context: "RunContext",
    what: str,
    length: Callable[[Any], int] | None = None,
) -> DataReport:
    """Prepare this process's share of the sources and count; all processes must call it and get the same.

    Args:
        sources: to look at.
        total: how many there are.
        prepare: makes the examples of one; raises ToolkitError for a bad one.
        what: the sources are called.
        length: tokens of an example, to count; None for none.
    """
    wanted = context.recipe.train.num_train_epochs is not None
    report = DataReport(lengths={} if wanted else None)
    for at, source in enumerate(counted(sources, total, f"data: {what} checked")):
        if at % context.world_size == context.rank:
            report.add(source, prepare, at, length)
    report.gather(context)
    return report


def raise_by_policy(report: DataReport, name: str, on_bad_lines: str) -> None:
    """Raise ToolkitError for lines of what is called ``name`` that the recipe's policies do not pass over."""
    if report.too_long:
        lines = shown(report.too_long)
        raise ToolkitError(
            f"{name} has {len(report.too_long)} lines that are too long: {lines}; raise train.max_length, or set "
            "objective.excess_length_strategy to truncate or drop."
        )
    if report.bad and on_bad_lines == "error":
        raise bad_lines_error(name, report.bad)


def written(
    report: DataReport,
    what: str,
    max_length: int,
    tokenizer: Any,
    notes: list[str],
    example: Any,
    around: tuple[str, str] = (BEGIN, END),
) -> str:
    """The report as text.

    Args:
        what: the sources are called.
        max_length: ``train.max_length``.
        notes: more lines.
        example: (token ids, whether each counts) of the first example; None for no example.
        around: marks of what counts in it.
    """
    counts = report.counts
    kept = report.sources - len(report.bad) - len(report.dropped)
    lines = [
        f"data: {kept:,} of {report.sources:,} {what} kept: {counts['examples']:,} examples, {counts['tokens']:,} "
        f"tokens, {counts['counted']:,} of them count in the loss, {counts['tokens'] - counts['counted']:,} are masked"
    ]
    if report.sizes:
        lines.append(f"  lengths: {_lengths(report.sizes)}")
    if report.bad:
        lines.append(f"  skipped: {len(report.bad):,} {what} ({shown(report.bad)})")
    if report.dropped:
        numbers = ", ".join(map(str, report.dropped[:5])) + (", ..." if len(report.dropped) > 5 else "")
        why = f"nothing that counts is within train.max_length {max_length}"
        lines.append(f"  dropped: {len(report.dropped):,} {what} ({numbers}): {why}")
    remarks = {
        "cut": f"cut: {{}} examples at train.max_length {max_length}, {counts['cut_tokens']:,} tokens",
        "parted": f"split: {{}} examples longer than train.max_length {max_length}, into parts",
        "split": "split: {} conversations, whose template rewrites earlier turns: each such turn is an example",
        "straddles": "note: in {} examples one token has the prompt's end and the completion's beginning; it counts. "
        "End prompts before a space, not behind it",
        "reopened": "note: in {} examples the template opens the turn otherwise than its generation prompt does; what "
        "counts begins where the two part",
        "hidden_tools": "note: in {} conversations the template shows nothing of a tool or of a call",
        "hidden_parts": "note: in {} conversations the template leaves out a part of what the assistant has written "
        "(its thoughts, say); set objective.chat_template to one that shows it",
        "dropped_messages": "note: in {} conversations the template shows nothing of a message",
    }
    lines += [f"  {text.format(f'{counts[name]:,}')}" for name, text in remarks.items() if counts[name]]
    if report.turn_ends[None]:
        lines.append(
            f"  note: {report.turn_ends[None]:,} turns end without a special token, so the model does not learn where "
            "to stop; end them in the chat template"
        )
    lines += [f"  {note}" for note in notes]
    if example is not None:
        (begin, end), (ids, mask) = around, example
        lines.append(f"example ({what[:-1]} {report.first_number}; {begin}what counts in the loss{end}):")
        lines += [f"  | {line}" for line in marked(tokenizer, ids, mask, around).split("\n")]
    return "\n".join(lines)


def _lengths(sizes: Counter[int]) -> str:
    """Statistics of the tokens of examples."""
    count, ordered = sizes.total(), sorted(sizes.items())
    ends = list(accumulate(number for _, number in ordered))

    def quantile(share: float) -> int:
        return next(size for (size, _), end in zip(ordered, ends) if end >= share * count)

    mean = sum(size * number for size, number in ordered) / count
    return (
        f"{ordered[0][0]:,} to {ordered[-1][0]:,} tokens, mean {mean:,.1f}, median {quantile(0.5):,}, "
        f"95 % <= {quantile(0.95):,}"
    )


def marks() -> tuple[str, str]:
    """What is around text that counts: colour on a terminal that takes it, else ``BEGIN`` and ``END``."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return (BEGIN, END) if plain else ("\x1b[1;32m", "\x1b[0m")


def for_terminal(text: str) -> str:
    """The text with what the terminal cannot show as escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def marked(tokenizer: Any, ids: list[int], mask: list[bool], around: tuple[str, str] = (BEGIN, END)) -> str:
    """The text of tokens, marks around what counts; without the middle of a long one, control characters as escapes."""
    chunks: list[tuple[str, bool]] = []
    begin = 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or mask[at] != mask[begin]:
            text = tokenizer.decode(ids[begin:at], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            chunks.append((text, mask[begin]))
            begin = at
    total, half = sum(len(text) for text, _ in chunks), EXAMPLE_CHARACTERS // 2
    if total > EXAMPLE_CHARACTERS:
        gap = (f" ... ({total - 2 * half:,} characters) ... ", False)
        chunks = [*_first(chunks, half), gap, *_first([(text[::-1], on) for text, on in chunks[::-1]], half, -1)[::-1]]
    return "".join(f"{around[0]}{_escaped(text)}{around[1]}" if on else _escaped(text) for text, on in chunks)


def _first(chunks: list[tuple[str, bool]], most: int, step: int = 1) -> list[tuple[str, bool]]:
    """The first ``most`` characters of chunks, each then read by ``step``."""
    kept: list[tuple[str, bool]] = []
    for text, on in chunks:
        if most > 0:
            kept.append((text[:most][::step], on))
            most -= len(text)
    return kept


def _escaped(text: str) -> str:
    return "".join(one if one == "\n" or one.isprintable() else one.encode("unicode_escape").decode() for one in text)
