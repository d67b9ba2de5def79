"""Pretraining: every token of every document, measured by the bits per byte of held-out documents."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit.config import Recipe
from toolkit.patching.eval_mode import eval_mode
from toolkit.state.batch import RaggedBatch
from toolkit.training import corpus
from toolkit.training.data import PackedStream, encode
from toolkit.training.evaluate import Score, compressed_bits_per_byte, score_windows, windows
from toolkit.training.objectives.base import Objective, RunContext, divided
from toolkit.training.objectives.functions import next_token_loss


class _Micro(NamedTuple):
    batch: RaggedBatch
    targets: Tensor


class Pretrain(Objective):
    """Documents of section ``data``, packed without padding."""

    before = False

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        files = corpus.list_files(recipe.data)
        self.train_files, self.held_out_files = corpus.split(files, recipe.data.held_out)
        self.fingerprint = corpus.fingerprint(files)

    def describe(self) -> str:
        return f"{len(self.train_files)} files to train on, {len(self.held_out_files)} held out"

    def texts(self) -> Iterator[str]:
        return (file.read() for file in corpus.take_bytes(self.train_files, self.recipe.tokenizer.max_bytes))

    def bind(self, setting: RunContext) -> None:
        super().bind(setting)
        recipe = self.recipe
        count = setting.world if recipe.data.streams is None else recipe.data.streams
        mine = divided("data.streams", count, setting.world)
        self.streams = [
            PackedStream(
                self.train_files,
                setting.tokenizer,
                batch_tokens=recipe.train.batch_tokens,
                max_length=recipe.train.max_length,
                interleave=recipe.data.interleave,
                seed=recipe.seed,
                rank=setting.rank * mine + index,
                world=count,
            )
            for index in range(mine)
        ]

    def updates(self, step: int) -> Iterator[Sequence[_Micro]]:
        yield [self._next_batch(stream) for stream in self.streams for _ in range(self.recipe.train.accumulate)]

    def _next_batch(self, stream: PackedStream) -> _Micro:
        packed, device = stream.next_batch(), self.setting.device
        targets = torch.tensor([token for targets in packed.targets for token in targets], device=device)
        return _Micro(RaggedBatch.from_sequences(packed.inputs, device=device, share=False), targets)

    def loss(self, forward: Callable[..., Any], micro: _Micro) -> Tensor:
        return next_token_loss(forward(micro.batch), micro.targets) / (self.recipe.train.accumulate * len(self.streams))

    def rows(self, micro: _Micro) -> int:
        return len(micro.batch.tokens)

    def finish(self) -> tuple[int, dict[str, float]]:
        train = self.recipe.train
        tokens = train.batch_tokens * train.accumulate * len(self.streams) * self.setting.world
        return tokens, {"epoch": self.streams[0].epoch}

    def state_dict(self) -> dict[str, Any]:
        return {"streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for stream, position in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(position)

    def held_out_texts(self) -> list[str]:
        """The held-out documents that ``evaluate.max_bytes`` allows."""
        return [file.read() for file in corpus.take_bytes(self.held_out_files, self.recipe.evaluate.max_bytes)]

    def score(self, texts: list[str]) -> Score:
        """-log2 p of every token of every document, each document on its own, the first token conditioned on eos.

        Bytes are those of the UTF-8 text. The processes share the work and all get the score.
        """
        train, setting = self.recipe.train, self.setting
        eos: Any = setting.tokenizer.eos_token_id
        overlap = min(int(train.max_length * self.recipe.evaluate.overlap), train.max_length - 1)
        documents = [encode(setting.tokenizer, text) for text in texts]
        cut = [window for ids in documents for window in windows(ids, eos, train.max_length, overlap)]
        mine = cut[setting.rank :: setting.world]
        with eval_mode(setting.model):
            bits = score_windows(setting.model, mine, train.batch_tokens, setting.device)
        (total,) = setting.total([bits])
        return Score(total, sum(map(len, documents)), sum(len(text.encode("utf-8")) for text in texts))

    def evaluate(self) -> dict[str, Any]:
        begun = time.monotonic()
        texts = self.held_out_texts()
        score = self.score(texts)
        compressed = compressed_bits_per_byte("".join(texts).encode("utf-8"))
        return {
            "files": len(texts),
            "bytes": score.bytes,
            "tokens": score.tokens,
            "seconds": round(time.monotonic() - begun, 1),
            "bits_per_byte": {"model": score.bits_per_byte, **compressed},
        }

    def show(self, before: dict[str, Any] | None, after: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.table import Table

        print(f"held-out text: {after['files']} files, {after['bytes']:,} bytes")
        table = Table()
        table.add_column("compressor")
        table.add_column("bits per byte", justify="right")
        for name, value in after["bits_per_byte"].items():
            table.add_row(name, f"{value:.3f}")
        Console(file=sys.stdout).print(table)
