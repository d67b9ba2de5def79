"""Sources of examples for SFT and DPO in order, with a position: lines of a file, and what packs them."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from toolkit.chat import prompt_token_ids
from toolkit.errors import ToolkitError
from toolkit.training.corpus import digest
from toolkit.training.division import Division
from toolkit.training.preparing import Example

MOST_MISSES = 1_000_000


class Stream(Protocol):
    """Endless examples with a position."""

    def take(self, count: int) -> list[Any]:
        """The next ``count``."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position of a stream with the same arguments."""

    def follow(self, states: Sequence[dict[str, Any]]) -> None:
        """Go to where the streams of another number of processes were, which read what they have not."""


class LineStream:
    """Endless lines, in an order of their hashes that is another one every epoch; every process its share.

    Args:
        lines: of all datasets, one behind the other.
        shares: (number of lines, how often an epoch has each on average) of every dataset; None is each line once. Of
            2.5 every line comes twice, and half of them, others every epoch, a third time.
    """

    def __init__(
        self,
        lines: Sequence[Any],
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        shares: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        self._shares = [(len(lines), 1.0)] if shares is None else shares
        if len(lines) < world_size:
            raise ToolkitError(
                f"objective.data_files must have a line for each of {world_size} processes, got {len(lines)}."
            )
        self._lines, self._seed, self._division = lines, seed, Division(rank, world_size)
        self._epoch, self._done = 0, 0
        self._share = self._order()

    def _order(self) -> list[int]:
        salt, first = f"{self._seed}/{self._epoch}", 0
        keys: dict[int, int] = {}  # lines are numbered on in further rounds of their dataset
        for count, weight in self._shares:
            rounds, part = divmod(weight, 1)
            again = sorted(range(count), key=lambda at: digest(f"{salt}/again/{first + at}"))[: round(part * count)]
            for number, members in enumerate([*([range(count)] * int(rounds)), again]):
                for at in members:
                    line = first + at
                    keys[number * len(self._lines) + line] = digest(f"{salt}/{line}" + (f"/{number}" * (number > 0)))
            first += count
        order = [number % len(self._lines) for number in sorted(keys, key=keys.__getitem__)]
        return self._division.share(order, self._epoch)

    @property
    def lines_per_epoch(self) -> int:
        """Of this process."""
        return len(self._share)

    def take(self, count: int) -> list[Any]:
        """The next ``count`` lines."""
        taken = []
        for _ in range(count):
            while self._done == len(self._share):
                self._epoch, self._done = self._epoch + 1, 0
                self._share = self._order()
            taken.append(self._lines[self._share[self._done]])
            self._done += 1
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON."""
        return {"epoch": self._epoch, "done": self._done, **self._division.state_dict(self._epoch)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position of a stream with the same arguments."""
        self._epoch, self._done = state["epoch"], state["done"]
        self._division.load_state_dict(state)
        self._share = self._order()

    def follow(self, states: Sequence[dict[str, Any]]) -> None:
        """Go to where the streams of another number of processes were."""
        self._division.follow(states, [[state["epoch"], state["done"]] for state in states])
        self._epoch, self._done = min(state["epoch"] for state in states), 0
        self._share = self._order()


class Packed:
    """Whole examples packed up to ``batch_tokens`` rows; one that does not fit opens the next batch.

    Args:
        stream: of sources.
        make: the examples of a source: none, one or several.
        batch_tokens: rows of a batch.
        batch_size: examples of a batch, in the place of its rows; None counts rows.
    """

    def __init__(
        self,
        stream: Stream,
        make: Callable[[Any], Sequence[Example]],
        batch_tokens: int,
        batch_size: int | None = None,
    ) -> None:
        self._stream, self._make = stream, make
        self._batch_tokens, self._batch_size = batch_tokens, batch_size
        self._examples: Sequence[Example] = []
        self._done = 0
        """Of the examples of the source read last."""
        self._before: dict[str, Any] = {}
        """The stream's position before that source."""

    def _peek(self) -> Example:
        """The next example, which stays the next one."""
        misses = 0
        while self._done == len(self._examples):
            self._before = self._stream.state_dict()
            self._examples, self._done = self._make(self._stream.take(1)[0]), 0
            misses += 1
            check_misses(misses)
        return self._examples[self._done]

    def next_batch(self) -> list[Example]:
        """At least one example."""
        batch: list[Example] = []
        rows = 0
        while len(batch) != self._batch_size:
            example = self._peek()
            if self._batch_size is None and batch and rows + len(example.inputs) > self._batch_tokens:
                break
            self._done += 1
            batch.append(example)
            rows += len(example.inputs)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON."""
        if self._done == len(self._examples):
            return self._stream.state_dict()
        return {**self._before, **({"example": self._done} if self._done else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position of a packing with the same arguments."""
        self._stream.load_state_dict({key: value for key, value in state.items() if key != "example"})
        self._examples, self._done = [], 0
        if state.get("example"):
            self._peek()
            self._done = state["example"]

    def follow(self, states: Sequence[dict[str, Any]]) -> None:
        """Go to where another number of processes was. A source of which one has trained on a part is read again."""
        self._stream.follow([{key: value for key, value in state.items() if key != "example"} for state in states])
        self._examples, self._done = [], 0


def check_misses(misses: int) -> None:
    """Raise ToolkitError where sources without an example follow each other without end."""
    if misses > MOST_MISSES:
        raise ToolkitError(
            f"objective must give an example that fits train.max_length, got {MOST_MISSES:,} in a row that do not."
        )


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt as completions are trained with; without any, the end-of-text token."""
    return prompt_token_ids(tokenizer, prompt) or [tokenizer.eos_token_id]
