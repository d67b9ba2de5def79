"""Finds words that stay out of the project: private terms where the field has one, and noise.

``python -m tools.vocabulary [PATH ...]`` lists each use and what to write instead; it exits with 1 if there is one.
"""

import io
import os
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".h", ".cpp", ".toml"}
EXEMPT = {
    "tools/vocabulary.py",
    "tests/test_vocabulary.py",
    "CHANGELOG.md",
    "docs/http-api.md",
}  # the last is generated
"""This list itself, its test, and the page that names old words beside new ones."""
SKIPPED_FOLDERS = {".venv", ".git", "build", "runs", "results", "site", "__pycache__"}

_COUNTED = "row|file|page|slot|host|token|layer|prompt|role|kind|target|folder|op|group|list"
PROSE = {
    r"\bcompany\b": "batch neighbours",
    r"keeps? (its|their|the) bits|\bown bits\b|(the )?same bits|equal bits|its bits": "bitwise identical",
    r"\bstands? alone\b": "is batch-invariant",
    r"(?<!ai-)vendor('s)?\b": "cuBLAS / MKL",
    r"grouped products?|matrix products?": "grouped GEMM, matmul",
    r"\bK order\b": "reduction order",
    r"\btiers?\b": "numerics mode (of tests: level)",
    r"\bthe price of\b|\bat the price\b": "overhead, cost",
    r"\bmixtures? of experts\b|\b(a|of|this|that|such) mixtures?\b(?! distribution)": "MoE model",
    r"\bshared out\b": "sharded",
    r"\blikeliest\b": "most probable, top-k",
    r"\bdrawn\b|(?<!data\.)\bdraws?\b|\bdrawing\b": "sampled, sample",
    r"\bforests?\b": "prefix tree(s)",
    r"\bgo(es)? on (from|with)\b|\bgo on\b|\bgoes on\b": "continues, resume with",
    r"\bwidened\b|\bH wide\b": "upcast, hidden size",
    r"\btwins?\b": "probe copy, torch reference",
    r"\bbent\b": "score-mod backward",
    r"\bdisorder\b": "entropy term",
    r"\bseams?\b": "interface adapter",
    r"\bleft alone\b": "skipped",
    r"(?<!\")\brefusals?\b(?!\")": "skip reason, error",
    r"\brecorded programs?\b": "captured graph",
    r"\bopenings\b": "role chunk",
    r"\blast words\b": "final events",
    r"\btwo minds\b": "mixed weight versions",
    r"\bsurprise\b": "negative log-likelihood",
    r"\bmade tasks?\b": "synthetic task",
    r"\bheld-out success\b": "eval accuracy",
    r"\bit must be\b|\bis (allowed|permitted):|\ballowed (are|is)\b": "X must be ..., got ...",
    r"\bfor want of\b": "out of",
    r"\bhosts\b(?! file)": "frameworks",
    rf"\ba ({_COUNTED}) a ({_COUNTED})\b": "one ... per ...",
    r"\bwhatever\b": "any",
    r"\balike\b": "equal, the same way",
    r"\bof (its|their|his) own\b": "separate, or leave out",
    r"\bfor the time being\b|\bby itself\b|\bby themselves\b|\bdoes without\b": "leave out",
}
"""Regular expressions over any text, case ignored: what to write instead."""

NAMES = {
    "company": "neighbours", "place": "row, index, offset", "places": "rows, indices, offsets",
    "draws": "samples", "drawn": "sampled", "likeliest": "top_k", "mixture": "moe", "mixtures": "moe",
    "twin": "probe_copy", "twins": "reference", "wide": "float32, hidden_size", "widened": "upcast",
    "bent": "score_mod", "disorder": "entropy", "seam": "interface", "refusal": "skipped", "refusals": "skipped",
    "readers": "query_ranges", "forest": "prefix_tree", "forests": "prefix_trees", "reach": "lookback",
    "saves": "store", "gone": "null_block", "piece": "chunk", "pieces": "chunks", "answer": "response",
    "answers": "responses", "openings": "role_chunk", "mail": "queue", "headline": "primary_metric",
    "figures": "metrics", "surprise": "nll", "tier": "numerics mode", "hosts": "frameworks",
    "site": "score_position", "correction": "expert_bias", "corrections": "expert_biases",
    "ticket": "request_handle", "tickets": "request_handles", "likely": "most_probable",
}  # fmt: skip
"""Parts of Python names, as ``_`` separates them: what to write instead."""

WHOLE_NAMES = {
    "mix": "moe_forward", "say": "log", "kl_weight": "beta", "cut_fraction": "truncated_fraction",
    "decided_by": "data-dependent op", "kept_groups": "topk_group", "left_alone": "skipped",
    "Served": "ServerConfig", "Setting": "RunContext", "Micro": "MicroBatch", "Lines": "JsonlDataset",
    "Sums": "MetricAccumulator", "OnTask": "OnPolicyObjective", "OnExamples": "OfflineObjective",
    "GroupPolicy": "GRPO", "Memory": "BlockManager", "Tables": "BlockTables",
}  # fmt: skip
"""Python names: what to write instead."""


FIELDS = {"service_tier", "score_answer", "use_bias_correction_kl"}
"""Names of other people's protocols and configurations, which stay."""


class Use(NamedTuple):
    """One use of a word that stays out."""

    path: Path
    line: int
    word: str
    instead: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.word!r}: write {self.instead}"


def uses(path: Path) -> Iterator[Use]:
    """Every use in one file, in order of kind and line."""
    text = path.read_text()
    where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, instead in PROSE.items():
            for match in re.finditer(pattern, line, re.IGNORECASE):
                yield Use(where, number, match.group(), instead)
    # The bodies of Triton kernels keep their local names.
    if path.suffix == ".py" and not path.name.startswith("triton"):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME and token.string not in FIELDS:
                parts = token.string.lower().replace("in_place", "").split("_")
                found = {WHOLE_NAMES.get(token.string), *map(NAMES.get, parts)}
                for instead in sorted(word for word in found if word is not None):
                    yield Use(where, token.start[0], token.string, instead)


def _below(folder: Path) -> Iterator[Path]:
    """Files of a folder, sorted; skipped folders are not entered, an environment has a hundred thousand files."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        yield from (Path(parent, name) for name in sorted(names))


def files(paths: list[Path]) -> Iterator[Path]:
    """The files below ``paths`` that are looked at."""
    for start in paths:
        for path in _below(start) if start.is_dir() else [start]:
            named = path.resolve().relative_to(ROOT).as_posix() if path.resolve().is_relative_to(ROOT) else str(path)
            if path.suffix in SUFFIXES and named not in EXEMPT and not SKIPPED_FOLDERS & set(path.parts):
                yield path.resolve()


def main(arguments: list[str]) -> int:
    found = [use for path in files([Path(one) for one in arguments] or [ROOT]) for use in uses(path)]
    for use in found:
        print(use)
    print(f"{len(found)} words that stay out", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
