"""How texts are split before BPE, by the name that GGUF has for it (``tokenizer.ggml.pre``).

A GGUF file holds that name alone. transformers takes GPT-2's splitting for every file of byte-level BPE.
"""

import json
from pathlib import Path
from typing import Any

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _bytes(False)]}


_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _bytes(True)]}
PRE_TOKENIZERS: dict[str, tuple[dict[str, Any], bool]] = {
    "gpt-2": (_bytes(True), False),
    "smollm": (_DIGITS, False),
    "qwen2": (_split(rf"{_WORDS}|\p{{N}}|{_REST}"), False),
    "llama-bpe": (_split(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), True),
}
"""By name: the pre-tokenizer as tokenizers writes it, and whether a piece that is a token is taken before merges."""
_ALIASES = {"starcoder": "smollm", "lfm2": "llama-bpe", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def pre_tokenizer_name(backend: dict[str, Any]) -> str | None:
    """The name of a tokenizer's splitting, None where it has none.

    Args:
        backend: the tokenizer as ``tokenizers`` writes it.
    """
    given = _plain(backend["pre_tokenizer"])
    merges_ignored = bool(backend["model"].get("ignore_merges"))
    for name, (known, ignored) in PRE_TOKENIZERS.items():
        if _plain(known) == given and ignored == merges_ignored:
            return name
    return None


def restore_pre_tokenizer(tokenizer: Any, file: Path) -> None:
    """Give a tokenizer that transformers read of a GGUF file the splitting that the file names, if it is known here."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    name = "" if field is None else str(field.contents())
    found = PRE_TOKENIZERS.get(_ALIASES.get(name, name))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if found is None or backend["model"]["type"] != "BPE" or backend["model"].get("byte_fallback"):
        return

    from tokenizers import Tokenizer

    backend["pre_tokenizer"], backend["model"]["ignore_merges"] = found
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))


def _plain(part: Any) -> Any:
    """A pre-tokenizer without what splits nothing: where offsets are cut, and spaces in names of characters."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Sequence" and len(part["pretokenizers"]) == 1:
        return _plain(part["pretokenizers"][0])
    if part.get("type") == "Sequence":
        return [_plain(one) for one in part["pretokenizers"]]
    return {key: value for key, value in part.items() if key != "trim_offsets"}
