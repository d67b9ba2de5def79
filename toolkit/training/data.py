"""Documents to packed batches, streamed, with a position that is a few integers.

Each document is ``eos + text + eos``. ``interleave`` documents are open at once; a batch is one row of
exactly ``batch_tokens`` predicted tokens, filled with chunks of at most ``max_length`` tokens from the open
documents in turn. A document's tokens are each predicted exactly once: where a chunk ends, the next starts
with the last token predicted as its first input. Nothing is padded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.errors import ToolkitError
from toolkit.training.corpus import SourceFile, in_hash_order

if TYPE_CHECKING:
    from datasets import IterableDataset

    from toolkit.training.tokenizer import Tokenizer


@dataclass(frozen=True)
class PackedBatch:
    """Sequences of one flat row of ``batch_tokens``: ``inputs[i][t]`` is followed by ``targets[i][t]``."""

    inputs: list[list[int]]
    targets: list[list[int]]


def _read(files: list[SourceFile]) -> Iterator[dict[str, str]]:
    for file in files:
        yield {"text": file.read()}


def token_stream(files: Sequence[SourceFile], tokenizer: "Tokenizer") -> "IterableDataset":
    """A streamed dataset of ``{"ids": eos + text + eos}``, one document per file, in the order given."""
    from datasets import IterableDataset

    eos = tokenizer.eos_token_id

    def tokenise(example: dict[str, str]) -> dict[str, list[int]]:
        return {"ids": [eos, *encode(tokenizer, example["text"]), eos]}

    dataset = IterableDataset.from_generator(_read, gen_kwargs={"files": list(files)})
    return dataset.map(tokenise, remove_columns=["text"])


def encode(tokenizer: "Tokenizer", text: str) -> list[int]:
    """The text's tokens and no others; text that looks like a special token is text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return ids


@dataclass
class _Open:
    """A document being read: which it is, its tokens, and how many of them have been predicted."""

    epoch: int
    index: int
    ids: list[int]
    predicted: int = 0


class PackedStream:
    """Endless packed batches over this rank's share of the files, reshuffled by file every epoch.

    ``state_dict()`` is JSON; after ``load_state_dict`` of it the same batches follow, token for token.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        tokenizer: "Tokenizer",
        *,
        batch_tokens: int,
        max_length: int,
        interleave: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(files) < world_size:
            raise ToolkitError(
                f"data.data_dir must hold a training file for each of {world_size} processes, got {len(files)}."
            )
        self._files, self._tokenizer = list(files), tokenizer
        self._batch_tokens, self._max_length = batch_tokens, max_length
        self._interleave, self._seed, self._rank, self._world_size = interleave, seed, rank, world_size
        self._epoch, self._next, self._turn = 0, 0, 0
        self._open: list[_Open] = []
        self._documents: Iterator[dict[str, Any]] | None = None

    @property
    def epoch(self) -> int:
        """Passes over the data that have been started, less one."""
        return self._epoch

    def _share(self, epoch: int) -> list[SourceFile]:
        return in_hash_order(self._files, f"{self._seed}/{epoch}")[self._rank :: self._world_size]

    def _open_next(self) -> _Open:
        while True:
            if self._documents is None:
                self._documents = iter(token_stream(self._share(self._epoch)[self._next :], self._tokenizer))
            document = next(self._documents, None)
            if document is not None:
                self._next += 1
                return _Open(self._epoch, self._next - 1, document["ids"])
            self._epoch, self._next, self._documents = self._epoch + 1, 0, None

    def next_batch(self) -> PackedBatch:
        """The next row of exactly ``batch_tokens`` predicted tokens."""
        while len(self._open) < self._interleave:
            self._open.append(self._open_next())
        batch, room = PackedBatch([], []), self._batch_tokens
        while room:
            document = self._open[self._turn]
            start = document.predicted
            length = min(self._max_length, room, len(document.ids) - 1 - start)
            batch.inputs.append(document.ids[start : start + length])
            batch.targets.append(document.ids[start + 1 : start + 1 + length])
            document.predicted += length
            room -= length
            if document.predicted == len(document.ids) - 1:
                self._open[self._turn] = self._open_next()
            self._turn = (self._turn + 1) % self._interleave
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position: epoch, next document, whose turn it is, and the open documents with their offsets."""
        return {
            "epoch": self._epoch,
            "next": self._next,
            "turn": self._turn,
            "open": [[document.epoch, document.index, document.predicted] for document in self._open],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that ``state_dict`` of a stream with the same arguments returned."""
        self._epoch, self._next, self._turn = state["epoch"], state["next"], state["turn"]
        self._documents = None
        # The open documents may span two epochs; each is read again and continues at its offset.
        files = [self._share(epoch)[index] for epoch, index, _ in state["open"]]
        documents = token_stream(files, self._tokenizer) if files else []
        self._open = [
            _Open(epoch, index, document["ids"], predicted)
            for (epoch, index, predicted), document in zip(state["open"], documents, strict=True)
        ]
