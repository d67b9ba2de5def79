"""A tokenizer as llama.cpp reads it: tokens, merges or scores, how texts are split, special tokens, chat template."""

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.errors import ToolkitError
from toolkit.exporting.hf import eos_token_ids
from toolkit.loading.gguf_pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_name

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's types of tokens."""
SPACE = "▁"
ENDS = 3
"""How many tokens that end a text a GGUF file names: end of sequence, of turn and of message."""


class Vocabulary(NamedTuple):
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: "gpt2" for byte-level BPE, "llama" for BPE of characters with bytes to fall back on.
        pre: GGUF's name of the splitting before it.
        tokens, types: of every row of the embedding.
        merges: of "gpt2", best first.
        scores: of "llama".
        space_prefix: whether a space is put before a text.
        begins, ends: whether bos and eos are put around a text.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    space_prefix: bool
    begins: bool
    ends: bool


def read_vocabulary(tokenizer: Any, rows: int, target: str) -> Vocabulary:
    """The vocabulary of a tokenizer.

    Args:
        rows: of the model's embedding; those beyond the tokenizer are unused tokens.

    Raises:
        ToolkitError: a kind of tokenizer, or a part of it, that llama.cpp does not have.
    """

    def refuse(what: str) -> ToolkitError:
        return ToolkitError(f"An export to {target!r} cannot hold the tokenizer: {what}.")

    if tokenizer is None:
        raise ToolkitError(f"tokenizer must be given for an export to {target!r}, got None: the file holds it, too.")
    if not getattr(tokenizer, "is_fast", False):
        raise refuse(f"{type(tokenizer).__name__} is written in Python, without a table of merges")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise refuse(f"its model must be BPE, got {model['type']}")
    if max(tokenizer.get_vocab().values()) >= rows:
        raise refuse(
            f"its ids must be below the {rows} rows of the embedding, got {max(tokenizer.get_vocab().values())}"
        )
    byte_level = not model.get("byte_fallback")
    if byte_level:
        pre = pre_tokenizer_name(backend)
        if pre is None:
            given = json.dumps(backend["pre_tokenizer"], ensure_ascii=False)
            raise refuse(f"how it splits texts must be one of {', '.join(PRE_TOKENIZERS)}, got {given[:160]}")
        if (backend["normalizer"] or {"type": "NFC"})["type"] != "NFC":
            raise refuse(f"its normalizer must be NFC or none, got {backend['normalizer']['type']}")
        space_prefix = False
    else:
        pre, space_prefix = "default", _space_prefix(backend, refuse)
    tokens, types = _tokens(backend, tokenizer, rows, byte_level)
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else list(pair) for pair in model["merges"]]
    first, last = _around(tokenizer)
    return Vocabulary(
        "gpt2" if byte_level else "llama",
        pre,
        tokens,
        types,
        [" ".join(pair) for pair in pairs] if byte_level else None,
        None if byte_level else _scores(pairs, model["vocab"], tokens, types, refuse),
        space_prefix,
        first,
        last,
    )


def write_vocabulary(writer: "GGUFWriter", vocabulary: Vocabulary, tokenizer: Any, model: Any, target: str) -> None:
    """Add the tokenizer, its special tokens and its chat templates."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    writer.add_add_bos_token(vocabulary.begins)
    writer.add_add_eos_token(vocabulary.ends)
    bos = tokenizer.bos_token_id
    if bos is not None:
        writer.add_bos_token_id(bos)
    ends = ordered_ends(model, tokenizer, target)
    for token, add in zip(ends, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)):
        add(token)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": one} for name, one in template.items()]
    if template:
        writer.add_chat_template(template)


def ordered_ends(model: Any, tokenizer: Any, target: str) -> list[int]:
    """Tokens that end a text, the tokenizer's own first.

    Raises:
        ToolkitError: more than a file can name.
    """
    found = eos_token_ids(model, tokenizer)
    own = tokenizer.eos_token_id
    found = list(dict.fromkeys([*([own] if own in found else []), *found]))
    if len(found) > ENDS:
        raise ToolkitError(f"An export to {target!r} holds at most {ENDS} tokens that end a text, got {found}.")
    return found


def _tokens(backend: dict[str, Any], tokenizer: Any, rows: int, byte_level: bool) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{row}]" for row in range(rows)], [UNUSED] * rows
    for token, row in backend["model"]["vocab"].items():
        tokens[row], types[row] = token, NORMAL
        if not byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[row] = BYTE
    for added in backend["added_tokens"]:
        text = added["content"]
        tokens[added["id"]] = text if byte_level else text.replace(" ", SPACE)
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if not byte_level and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    return tokens, types


def _space_prefix(backend: dict[str, Any], refuse: Any) -> bool:
    """Whether BPE of characters puts a space before a text; what splits or changes it otherwise is refused."""
    normalizer, splitting = backend["normalizer"], backend["pre_tokenizer"]
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    names = [step["type"] for step in steps]
    if names in (["Replace"], ["Prepend", "Replace"]):
        if steps[-1]["pattern"] != {"String": " "} or steps[-1]["content"] != SPACE:
            raise refuse(f"its normalizer must make {SPACE} of spaces, got {steps[-1]}")
        if splitting is not None and (splitting["type"], splitting.get("pattern")) != ("Split", {"String": " "}):
            raise refuse(f"it must not split texts before BPE, got {splitting['type']}")
        return len(names) == 2
    if not names and splitting is not None and splitting["type"] == "Metaspace" and not splitting.get("split", True):
        return bool(splitting["prepend_scheme"] != "never")
    raise refuse(f"its normalizer must be Prepend and Replace, Replace, or none with Metaspace, got {names}")


def _scores(
    pairs: list[list[str]], vocab: dict[str, int], tokens: list[str], types: list[int], refuse: Any
) -> list[float]:
    """Minus the rank of the merges that make a token: llama.cpp merges what makes the best-scored token.

    Raises:
        ToolkitError: merges whose order no score of tokens gives.
    """
    scores = [0.0] * len(tokens)
    last: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        merged = left + right
        row = vocab[merged]
        if merged in last and last[merged] != rank - 1 and types[row] == NORMAL:
            raise refuse(f"merges that make {merged!r} must follow each other, got ranks {last[merged]} and {rank}")
        if merged not in last:
            scores[row] = -float(rank)
        last[merged] = rank
    return [
        -1e9 if kind in (NORMAL, USER_DEFINED) and tokens[row] not in last else scores[row]
        for row, kind in enumerate(types)
    ]


def _around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before and eos behind a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    before = len(whole) > len(plain) and whole[0] == tokenizer.bos_token_id
    after = len(whole) > len(plain) and whole[-1] == tokenizer.eos_token_id
    return before, after
