"""What a finished run says about itself: figures for result.json, and the same on the terminal."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from toolkit.training.corpus import take_bytes
from toolkit.training.data import encode
from toolkit.training.evaluate import Score, compressed_bits_per_byte, score_windows, windows
from toolkit.training.metrics import FILE as METRICS
from toolkit.training.metrics import read_metrics

if TYPE_CHECKING:
    from toolkit.training.loop import Trainer


def held_out_texts(trainer: "Trainer") -> list[str]:
    """The held-out documents that ``evaluate.max_bytes`` allows."""
    return [file.read() for file in take_bytes(trainer.held_out_files, trainer.recipe.evaluate.max_bytes)]


def evaluate(trainer: "Trainer", texts: list[str]) -> Score:
    """-log2 p of every token of every document, each document on its own, the first token conditioned on eos.

    Bytes are those of the UTF-8 text. The processes share the work and all get the score.
    """
    train, accelerator = trainer.recipe.train, trainer.accelerator
    eos = trainer.tokenizer.eos_token_id
    overlap = min(int(train.max_length * trainer.recipe.evaluate.overlap), train.max_length - 1)
    documents = [encode(trainer.tokenizer, text) for text in texts]
    cut = [window for ids in documents for window in windows(ids, eos, train.max_length, overlap)]
    mine = cut[accelerator.process_index :: accelerator.num_processes]
    trainer.ragged.eval()
    try:
        bits = score_windows(trainer.ragged, mine, train.batch_tokens, accelerator.device)
    finally:
        trainer.ragged.train()
    total = torch.tensor(bits, dtype=torch.float64, device=accelerator.device)
    bits = cast(Tensor, accelerator.reduce(total, "sum")).item()
    return Score(bits, sum(map(len, documents)), sum(len(text.encode("utf-8")) for text in texts))


def figures(trainer: "Trainer") -> dict[str, Any]:
    """Figures of the finished run; with the held-out comparison unless the recipe turns it off."""
    lines = read_metrics(trainer.folder / METRICS)[-20:]
    tokens = trainer.step * trainer.tokens_per_step
    result: dict[str, Any] = {
        "name": trainer.recipe.name,
        "steps": trainer.step,
        "parameters": trainer.parameters,
        "tokens": tokens,
        "seconds": round(trainer.seconds, 1),
        "tokens_per_second": round(tokens / max(trainer.seconds, 1e-9), 1),
        "loss": sum(line["loss"] for line in lines) / max(len(lines), 1),
        "numerics": str(trainer.patch_report.numerics),
        "threads": torch.get_num_threads(),
        "processes": trainer.accelerator.num_processes,
    }
    if trainer.recipe.evaluate.enabled:
        begun = time.monotonic()
        texts = held_out_texts(trainer)
        score = evaluate(trainer, texts)
        result["held_out"] = {
            "files": len(texts),
            "bytes": score.bytes,
            "tokens": score.tokens,
            "seconds": round(time.monotonic() - begun, 1),
            "bits_per_byte": {
                "model": score.bits_per_byte,
                **compressed_bits_per_byte("".join(texts).encode("utf-8")),
            },
        }
    return result


def show(result: dict[str, Any], folder: Path) -> None:
    """Print the figures: a line on the training, a small table on the held-out text."""
    print(
        f"trained {result['steps']} steps, {result['tokens']:,} tokens in {result['seconds']:.0f} s "
        f"({result['tokens_per_second']:,.0f} tokens/s), loss {result['loss']:.3f}"
    )
    held_out = result.get("held_out")
    if held_out:
        from rich.console import Console
        from rich.table import Table

        print(f"held-out text: {held_out['files']} files, {held_out['bytes']:,} bytes")
        table = Table()
        table.add_column("compressor")
        table.add_column("bits per byte", justify="right")
        for name, value in held_out["bits_per_byte"].items():
            table.add_row(name, f"{value:.3f}")
        Console(file=sys.stdout).print(table)
    print(f"run: {folder}", flush=True)
