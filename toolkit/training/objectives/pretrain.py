"""Pretraining: every token of every document, measured by the bits per byte of held-out documents."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from toolkit.config import Recipe
from toolkit.config.objective import ObjectiveSection
from toolkit.errors import ToolkitError
from toolkit.training import corpus
from toolkit.training.data import PackedStream, encode
from toolkit.training.objectives.base import Metrics, Objective, RunContext, divided

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.state.batch import RaggedBatch
    from toolkit.training.evaluate import Score


class PretrainSection(ObjectiveSection):
    """Next-token cross-entropy over the documents of section ``data``."""

    supports_gradient_accumulation: ClassVar[bool] = True

    kind: Literal["pretrain"] = "pretrain"


class MicroBatch(NamedTuple):
    """Chunks of documents, and the next token of each row."""

    batch: "RaggedBatch"
    targets: "Tensor"


class Pretrain(Objective[PretrainSection]):
    """Documents of section ``data``, packed without padding."""

    eval_on_start = False
    eval_metric = "eval_bits_per_byte"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        files = corpus.list_files(recipe.data)
        self.train_files, self.held_out_files = corpus.split(files, recipe.data.val_set_size)
        self.fingerprint = corpus.fingerprint(files)

    def describe(self) -> str:
        return f"{len(self.train_files)} files to train on, {len(self.held_out_files)} held out"

    def data_changed(self) -> str:
        return f"data.data_dir '{self.recipe.data.data_dir}' has other files"

    def texts(self) -> Iterator[str]:
        return (file.read() for file in corpus.take_bytes(self.train_files, self.recipe.tokenizer.max_bytes))

    def bind(self, context: RunContext) -> None:
        super().bind(context)
        recipe = self.recipe
        count = context.world_size if recipe.data.streams is None else recipe.data.streams
        mine = divided("data.streams", count, context.world_size)
        self.streams = [
            PackedStream(
                self.train_files,
                context.tokenizer,
                batch_tokens=recipe.train.batch_tokens,
                max_length=recipe.train.max_length,
                interleave=recipe.data.interleave,
                seed=recipe.seed,
                rank=context.rank * mine + index,
                world_size=count,
            )
            for index in range(mine)
        ]

    def updates(self, step: int) -> Iterator[Sequence[MicroBatch]]:
        forwards = self.recipe.train.gradient_accumulation_steps
        yield [self._next_batch(stream) for stream in self.streams for _ in range(forwards)]

    def _next_batch(self, stream: PackedStream) -> MicroBatch:
        import torch

        from toolkit.state.batch import RaggedBatch

        packed, device = stream.next_batch(), self.context.device
        targets = torch.tensor([token for targets in packed.targets for token in targets], device=device)
        return MicroBatch(RaggedBatch.from_sequences(packed.inputs, device=device, share=False), targets)

    def loss(self, forward: Callable[..., Any], micro: MicroBatch) -> "Tensor":
        from toolkit.training.losses import next_token_loss

        forwards = self.recipe.train.gradient_accumulation_steps * len(self.streams)
        return next_token_loss(forward(micro.batch), micro.targets) / forwards

    def rows(self, micro: MicroBatch) -> int:
        return len(micro.batch.tokens)

    def finish(self) -> tuple[int, dict[str, float]]:
        train = self.recipe.train
        tokens = train.batch_tokens * train.gradient_accumulation_steps * len(self.streams) * self.context.world_size
        return tokens, {"epoch": self.streams[0].epoch}

    def state_dict(self) -> dict[str, Any]:
        return {"streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for stream, position in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(position)

    def follow(self, states: Sequence[dict[str, Any]]) -> None:
        positions = [position for state in states for position in state["streams"]]
        mine, processes = len(self.streams), self.context.world_size
        if len(positions) != mine * processes:
            raise ToolkitError(
                f"data.streams must be {len(positions)} to resume with {processes} processes what {len(states)} have "
                f"written, got {self.recipe.data.streams or 'null'}."
            )
        self.load_state_dict({"streams": positions[self.context.rank * mine :][:mine]})

    def held_out_texts(self) -> list[str]:
        """The held-out documents that ``evaluate.max_bytes`` allows."""
        return [file.read() for file in corpus.take_bytes(self.held_out_files, self.recipe.evaluate.max_bytes)]

    def score(self, texts: list[str]) -> "Score":
        """-log2 p of every token of every document, each document on its own, the first token conditioned on eos.

        Bytes are those of the UTF-8 text. The processes share the work and all get the score.
        """
        from toolkit.patching.eval_mode import eval_mode
        from toolkit.training.evaluate import Score, score_windows, windows

        train, context = self.recipe.train, self.context
        eos: Any = context.tokenizer.eos_token_id
        overlap = min(int(train.max_length * self.recipe.evaluate.overlap), train.max_length - 1)
        documents = [encode(context.tokenizer, text) for text in texts]
        split = [window for ids in documents for window in windows(ids, eos, train.max_length, overlap)]
        mine = split[context.rank :: context.world_size]
        with eval_mode(context.model):
            bits = score_windows(context.model, mine, train.batch_tokens, context.device)
        (total,) = context.reduce_sum([bits])
        return Score(total, sum(map(len, documents)), sum(len(text.encode("utf-8")) for text in texts))

    def evaluate(self) -> Metrics:
        from toolkit.training.evaluate import compressed_bits_per_byte

        begun = time.monotonic()
        texts = self.held_out_texts()
        score = self.score(texts)
        compressed = compressed_bits_per_byte("".join(texts).encode("utf-8"))
        return {
            "eval_files": len(texts),
            "eval_bytes": score.bytes,
            "eval_num_tokens": score.tokens,
            "eval_runtime": round(time.monotonic() - begun, 1),
            "eval_bits_per_byte": score.bits_per_byte,
            **{f"eval_bits_per_byte/{name}": value for name, value in compressed.items()},
        }

    def show(self, before: Metrics | None, after: Metrics) -> None:
        from rich.console import Console
        from rich.table import Table

        print(f"held-out text: {after['eval_files']} files, {after['eval_bytes']:,} bytes")
        table = Table()
        table.add_column("compressor")
        table.add_column("bits per byte", justify="right")
        for name, value in after.items():
            if name.startswith("eval_bits_per_byte"):
                table.add_row(name.partition("/")[2] or "model", f"{value:.3f}")
        Console(file=sys.stdout).print(table)
