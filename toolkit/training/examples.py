"""Examples for SFT and DPO: made by a task, or the lines of a json lines file."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from toolkit.errors import ToolkitError, first_line
from toolkit.ops import IGNORED
from toolkit.training.corpus import digest
from toolkit.training.data import encode

if TYPE_CHECKING:
    from toolkit.training.tokenizer import Tokenizer

T = TypeVar("T")


class Stream(Protocol):
    """Endless examples with a position."""

    def take(self, count: int) -> list[Any]:
        """The next ``count``."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position of a stream with the same arguments."""


class Example(NamedTuple):
    """``inputs[t]`` is followed by ``targets[t]``; targets that do not count are -100."""

    inputs: list[int]
    targets: list[int]

    @property
    def counted(self) -> int:
        return sum(target != IGNORED for target in self.targets)


class JsonlDataset:
    """A json lines file in memory, split into training and held out by a hash of the line."""

    def __init__(self, path: str, val_set_size: float, known: Sequence[Mapping[str, type]]) -> None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise ToolkitError(f"objective.data_files must be a json lines file, got '{path}' ({reason}).") from None
        self.fingerprint = hashlib.sha256(text.encode("utf-8")).hexdigest()
        self.train: list[dict[str, Any]] = []
        self.held_out: list[dict[str, Any]] = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                side = self.held_out if digest(line) < int(val_set_size * 2**64) else self.train
                side.append(_checked(line, f"objective.data_files '{path}', line {number},", known))
        if not self.train:
            raise ToolkitError(f"objective.data_files must have a line to train on, got '{path}'.")


def _checked(line: str, where: str, known: Sequence[Mapping[str, type]]) -> dict[str, Any]:
    """A line as a mapping with one of the ``known`` sets of fields."""
    wanted = ", or ".join(" and ".join(f"'{name}'" for name in fields) for fields in known)
    try:
        value = json.loads(line)
    except ValueError:
        raise ToolkitError(f"{where} must be a JSON object with {wanted}.") from None
    for fields in known:
        if isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in fields.items()):
            return value
    raise ToolkitError(f"{where} must be a JSON object with {wanted}.")


class LineStream:
    """Endless lines, in an order of their hashes that is another one every epoch; every process its share."""

    def __init__(self, lines: Sequence[dict[str, Any]], seed: int, *, rank: int = 0, world_size: int = 1) -> None:
        if len(lines) < world_size:
            raise ToolkitError(
                f"objective.data_files must have a line for each of {world_size} processes, got {len(lines)}."
            )
        self._lines, self._seed, self._rank, self._world_size = lines, seed, rank, world_size
        self._epoch, self._done = 0, 0
        self._share = self._order()

    def _order(self) -> list[int]:
        order = sorted(range(len(self._lines)), key=lambda at: digest(f"{self._seed}/{self._epoch}/{at}"))
        return order[self._rank :: self._world_size]

    def take(self, count: int) -> list[dict[str, Any]]:
        """The next ``count`` lines."""
        taken = []
        for _ in range(count):
            if self._done == len(self._share):
                self._epoch, self._done = self._epoch + 1, 0
                self._share = self._order()
            taken.append(self._lines[self._share[self._done]])
            self._done += 1
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON."""
        return {"epoch": self._epoch, "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position of a stream with the same arguments."""
        self._epoch, self._done = state["epoch"], state["done"]
        self._share = self._order()


class Packed:
    """Whole examples packed up to ``batch_tokens`` rows; one that does not fit opens the next batch."""

    def __init__(self, stream: Stream, make: Callable[[Any], Example], batch_tokens: int) -> None:
        self._stream, self._make, self._batch_tokens = stream, make, batch_tokens
        self._waiting: tuple[Example, dict[str, Any]] | None = None

    def next_batch(self) -> list[Example]:
        """At least one example with a token that counts."""
        batch: list[Example] = []
        rows = 0
        while True:
            if self._waiting is None:
                before = self._stream.state_dict()
                self._waiting = self._make(self._stream.take(1)[0]), before
            example, _ = self._waiting
            if batch and rows + len(example.inputs) > self._batch_tokens:
                return batch
            self._waiting = None
            if example.counted:
                batch.append(example)
                rows += len(example.inputs)

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON."""
        return self._stream.state_dict() if self._waiting is None else self._waiting[1]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position of a packing with the same arguments."""
        self._waiting = None
        self._stream.load_state_dict(state)


def in_batches(items: Iterable[T], tokens: Callable[[T], int], most: int) -> list[list[T]]:
    """Items in order, in batches of at most ``most`` tokens; a larger item has a batch to itself."""
    batches: list[list[T]] = []
    room = 0
    for item in items:
        if not batches or tokens(item) > room:
            batches.append([])
            room = most
        batches[-1].append(item)
        room -= tokens(item)
    return batches


def prompt_ids(tokenizer: "Tokenizer", prompt: str) -> list[int]:
    """A prompt's tokens, with those that the tokenizer puts before any text; at least one."""
    return tokenizer(prompt, verbose=False)["input_ids"] or [tokenizer.eos_token_id]


def completion_ids(tokenizer: "Tokenizer", completion: str) -> list[int]:
    """A completion's tokens and the end of text."""
    return [*encode(tokenizer, completion), tokenizer.eos_token_id]


def example_of(prompt: list[int], completion: list[int], max_length: int) -> Example:
    """Only the completion counts; truncated to ``max_length`` inputs."""
    ids = [*prompt, *completion]
    targets = [IGNORED] * (len(prompt) - 1) + completion
    return Example(ids[:-1][:max_length], targets[:max_length])


def conversation(tokenizer: "Tokenizer", template: str | None, messages: Sequence[Any], max_length: int) -> Example:
    """A conversation by the chat template; what the template adds for each message of the assistant counts.

    Raises ToolkitError for messages that are malformed, and for a template that rewrites earlier turns: there is no one
    sequence then in which every turn is as it will be generated.
    """
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ToolkitError(f"messages must hold mappings with 'role' and 'content', got {message!r}.")
    ids: list[int] = []
    targets: list[int] = []
    for text, counted in _turns(tokenizer, template, list(messages)):
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += tokens
        targets += tokens if counted else [IGNORED] * len(tokens)
    return Example(ids[:-1][:max_length], targets[1:][:max_length])


def _turns(tokenizer: "Tokenizer", template: str | None, messages: list[Any]) -> Iterator[tuple[str, bool]]:
    """The conversation's text in chunks, and whether each is the assistant's."""

    def text(count: int, prompt: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages[:count], chat_template=template, tokenize=False, add_generation_prompt=prompt
                )
            )
        except Exception as error:  # jinja and templates raise anything
            raise ToolkitError(f"objective.chat_template does not take the messages: {first_line(error)}.") from None

    done = ""
    for count, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for whole, counted in ((text(count, True), False), (text(count + 1, False), True)):
            if not whole.startswith(done):
                raise ToolkitError(
                    "objective.chat_template must not rewrite earlier messages when later ones follow; give each turn "
                    "as 'prompt' and 'completion' instead."
                )
            yield whole[len(done) :], counted
            done = whole
