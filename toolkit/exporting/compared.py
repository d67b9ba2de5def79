"""A checkpoint exported, run by the target's own program, and compared with the engine token by token."""

import argparse
import json
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.engine import Engine, SamplingParams
from toolkit.exporting.base import TARGETS, is_lossless
from toolkit.exporting.hf import pooled_outputs
from toolkit.exporting.manifest import MANIFEST
from toolkit.exporting.writing import export
from toolkit.loading import choose_runner, find_source, load_model, load_with_adapters
from toolkit.patching.adapters import vocabulary_size
from toolkit.quantised import dequantise

PROMPTS = 8
TOKENS = 64
TOLERANCE = 1e-5
"""Of outputs that are no tokens, beside the largest value."""


@dataclass(frozen=True)
class Comparison:
    """An export, and what its program generated.

    Attributes:
        path: the folder that was written.
        consumer: the program and its version; None where none was run.
        equal: prompts, of ``PROMPTS``, of which it gave the engine's greedy tokens; of a model that generates nothing,
            its output within ``TOLERANCE``. None where none was run.
        tokens: of each of them, ``TOKENS`` or what a model of short sequences has room for; 0 where none are generated.
        lossless: whether all are equal unless something is wrong.
        left_out: what the manifest says of tensors that are not in the export, in a sentence.
    """

    path: Path
    consumer: str | None = None
    equal: int | None = None
    tokens: int = 0
    lossless: bool = False
    left_out: str | None = None

    @property
    def ok(self) -> bool:
        """Whether no token differs that should be equal."""
        return self.equal in (None, PROMPTS) or not self.lossless

    def __str__(self) -> str:
        what = f"{self.tokens} greedy tokens" if self.tokens else "output"
        return f"{self.consumer} on the export: {self.equal} of {PROMPTS} prompts give the same {what}"


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
    runner, _ = choose_runner(find_source(source))
    model, tokenizer = load_model(source, dtype, runner=runner)
    if not target.takes_quantised or quantise not in (None, target.format_of(model)):
        dequantise(model)
    generates = runner != "pooling"
    exported = load_with_adapters(source, dtype) if target.holds_adapters else model
    with Engine(model, tokenizer) if generates else nullcontext() as engine:
        longest = _longest(model) if engine is None else engine.max_model_len
        tokens = min(TOKENS, longest - longest // 2) if generates else 0
        prompts = text_prompts(tokenizer, vocabulary_size(model), random.Random(0))[:PROMPTS]
        prompts = [prompt[: longest // 2] for prompt in prompts]
        written = export(exported, path, to, tokenizer, quantise, prompts if check else (), tokens, imatrix)
        found = json.loads((written / MANIFEST).read_text())
        if found["proof"] is None:
            return Comparison(written, left_out=_left_out(found))
        theirs = found["proof"]["outputs"]
        if engine is None:
            equal = sum(map(_close, pooled_outputs(model, prompts), theirs))
        else:
            params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            equal = sum(list(one.token_ids) == its for one, its in zip(engine.generate(prompts, params), theirs))
    lossless = is_lossless(target, quantise) and dtype == "float32"
    return Comparison(written, found["proof"]["consumer"], equal, tokens, lossless, _left_out(found))


def _longest(model: Any) -> int:
    """Tokens of the longest text of a model that generates nothing."""
    return getattr(model.config, "max_position_embeddings", None) or 512


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    bound = TOLERANCE * max(map(abs, one))
    return len(one) == len(other) and all(abs(a - b) <= bound for a, b in zip(one, other))


def _left_out(found: dict[str, Any]) -> str | None:
    """Of a manifest."""
    lost = found["left_out"]
    if lost is None:
        return None
    return f"{found['format']} does not hold {lost['tensors']} tensors of the checkpoint, such as {lost['first']}"


def text_prompts(tokenizer: Any, vocabulary: int, source: random.Random) -> list[list[int]]:
    """32 prompts of 8 to 96 tokens: excerpts of the standard library's ``argparse``, or random ids."""
    if tokenizer is None:
        ids = [source.randrange(vocabulary) for _ in range(4096)]
    else:
        with open(argparse.__file__, encoding="utf-8") as file:
            ids = tokenizer(file.read(), add_special_tokens=False, verbose=False)["input_ids"]
    starts = [source.randrange(max(1, len(ids) - 96)) for _ in range(32)]
    return [ids[start : start + source.randint(8, 96)] for start in starts]
