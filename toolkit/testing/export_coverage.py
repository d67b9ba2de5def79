"""Which families each export target holds: small random models, exported and run by the target's own program."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.errors import ToolkitError
from toolkit.exporting import MANIFEST, TARGETS, export, is_lossless
from toolkit.testing.models import FAMILIES, from_config, random_model, tiny_tokenizer

EXPORTED = (
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "lfm2", "gemma2", "gpt_neox", "mixtral",
    "gpt_oss", "deepseek_v3", "qwen3_next", "qwen3_next_moe", "mamba2", "bamba",
)  # fmt: skip
"""Families that are measured."""
_MORE: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "num_hidden_layers": 6,
    },
    "qwen2": {"num_key_value_heads": 2},
    "qwen3_next_moe": {"linear_value_head_dim": 16},
}
HIDDEN, VOCABULARY = 64, 331
PROMPTS = [[5, 6, 7, 8], [200, 9, 13, 30, 41, 77, 8, 12, 99], [3, 4], [50, 60, 70, 80, 90, 100, 110]]
TOKENS = 12
ALL = TOKENS * len(PROMPTS)


class Cell(NamedTuple):
    """A family exported to a target.

    Attributes:
        target, quantise: of the export.
        same: greedy tokens of all prompts before the first that is not the model's; None without a consumer.
        lossless: whether all should be.
        refused: why the target does not hold it.
    """

    family: str
    target: str
    quantise: str | None
    same: int | None
    lossless: bool
    refused: str | None = None

    @property
    def shown(self) -> str:
        """As the table has it."""
        if self.refused is not None:
            return "refused"
        if self.same is None:
            return "written; its program is not installed"
        return f"{self.same} of {ALL}"


def columns(targets: Sequence[str]) -> list[tuple[str, str | None]]:
    """(target, format) of every column: targets of adapters are left out."""
    found: list[tuple[str, str | None]] = []
    for name in targets:
        target = TARGETS.find("--to", name)()
        if not target.holds_adapters:
            found += [(name, form) for form in target.formats or (None,)]
    return found


def family_model(family: str) -> Any:
    """A small random model."""
    if family in FAMILIES:
        return random_model(family, hidden=HIDDEN, vocabulary=VOCABULARY, **_MORE.get(family, {}))
    from transformers import AutoConfig

    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_attention_heads": 4}
    limits = {"max_position_embeddings": 128}
    return from_config(AutoConfig.for_model(family, **{**sizes, **ids, **limits, **_MORE[family]}))


def equal_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    pairs = list(zip(one, other))
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))


def measure_exports(families: Sequence[str], targets: Sequence[str]) -> Iterator[Cell]:
    """One cell after the other."""
    from toolkit.exporting.hf import generate_greedily

    for family in families:
        model, tokenizer = family_model(family), tiny_tokenizer(VOCABULARY)
        expected = generate_greedily(model, PROMPTS, TOKENS)
        for target, form in columns(targets):
            lossless = is_lossless(TARGETS.find("--to", target)(), form)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    path = export(model, Path(folder) / "out", target, tokenizer, form, PROMPTS, TOKENS)
                except ToolkitError as error:
                    yield Cell(family, target, form, None, lossless, str(error))
                    continue
                proof = json.loads((path / MANIFEST).read_text())["proof"]
            same = None if proof is None else sum(map(equal_tokens, expected, proof["outputs"]))
            yield Cell(family, target, form, same, lossless)
