"""A checkpoint exported, run by the target's own program, and compared with the engine token by token."""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.engine import Engine, SamplingParams
from toolkit.exporting.base import TARGETS, is_lossless
from toolkit.exporting.manifest import MANIFEST
from toolkit.exporting.writing import export
from toolkit.loading import load_model, load_with_adapters
from toolkit.patching.adapters import vocabulary_size
from toolkit.quantised import dequantise

PROMPTS = 8
TOKENS = 64


@dataclass(frozen=True)
class Comparison:
    """An export, and what its program generated.

    Attributes:
        path: the folder that was written.
        consumer: the program and its version; None where none was run.
        equal: prompts, of ``PROMPTS``, of which it gave the engine's greedy tokens; None where none was run.
        tokens: of each of them, ``TOKENS`` or what a model of short sequences has room for.
        lossless: whether all are equal unless something is wrong.
    """

    path: Path
    consumer: str | None = None
    equal: int | None = None
    tokens: int = 0
    lossless: bool = False

    @property
    def ok(self) -> bool:
        """Whether no token differs that should be equal."""
        return self.equal in (None, PROMPTS) or not self.lossless

    def __str__(self) -> str:
        equal = f"{self.equal} of {PROMPTS} prompts give the same {self.tokens} greedy tokens"
        return f"{self.consumer} on the export: {equal}"


def export_and_compare(
    source: str, path: str | Path, to: str = "hf", quantise: str | None = None, dtype: str = "float32",
    check: bool = True, imatrix: str | Path | None = None,
) -> Comparison:  # fmt: skip
    """``toolkit.export`` of a checkpoint, whose program's greedy tokens are compared with the engine's.

    Args:
        source: checkpoint folder, adapters, GGUF file or training run.
        path: a new or empty folder.
        to: the name of a target.
        quantise: one of the target's formats; None takes the one that a quantised model has, else the first.
        dtype: of the weights before that.
        check: whether the program is run, where it is installed.
        imatrix: as ``toolkit.export`` takes it.

    Raises:
        ToolkitError: what ``toolkit.export`` and loading refuse.
    """
    target = TARGETS.find("--to", to)()
    model, tokenizer = load_model(source, dtype)
    if not target.takes_quantised or quantise not in (None, target.format_of(model)):
        dequantise(model)
    with Engine(model, tokenizer) as engine:
        most = engine.max_model_len // 2
        tokens = min(TOKENS, engine.max_model_len - most)
        prompts = text_prompts(tokenizer, vocabulary_size(model), random.Random(0))[:PROMPTS]
        prompts = [prompt[:most] for prompt in prompts]
        exported = load_with_adapters(source, dtype) if target.holds_adapters else model
        written = export(exported, path, to, tokenizer, quantise, prompts if check else (), tokens, imatrix)
        proof = json.loads((written / MANIFEST).read_text())["proof"]
        if proof is None:
            return Comparison(written)
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        ours = [list(completion.token_ids) for completion in engine.generate(prompts, params)]
    equal = sum(a == b for a, b in zip(ours, proof["outputs"]))
    lossless = is_lossless(target, quantise) and dtype == "float32"
    return Comparison(written, proof["consumer"], equal, tokens, lossless)


def text_prompts(tokenizer: Any, vocabulary: int, source: random.Random) -> list[list[int]]:
    """32 prompts of 8 to 96 tokens: excerpts of the standard library's ``argparse``, or random ids."""
    if tokenizer is None:
        ids = [source.randrange(vocabulary) for _ in range(4096)]
    else:
        with open(argparse.__file__, encoding="utf-8") as file:
            ids = tokenizer(file.read(), add_special_tokens=False, verbose=False)["input_ids"]
    starts = [source.randrange(max(1, len(ids) - 96)) for _ in range(32)]
    return [ids[start : start + source.randint(8, 96)] for start in starts]
