"""The recipe's tokenizer: a Hugging Face fast tokenizer, loaded, or byte-level BPE trained on the spot."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from toolkit.config.schema import TokenizerSection
from toolkit.errors import ToolkitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer: TypeAlias = PreTrainedTokenizerBase
else:
    Tokenizer = Any

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> Tokenizer:
    """Byte-level BPE over the texts: lossless for any UTF-8 text, one special token (eos, also bos and pad).

    The same texts give the same tokenizer. ``max_length`` is what it announces as the model's longest input.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str | Path, field: str = "tokenizer.name_or_path") -> Tokenizer:
    """The fast tokenizer saved in a local folder. ToolkitError where there is none or it has no eos token."""
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise ToolkitError(f"{field} is '{path}'; it must be a local folder with a tokenizer.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise ToolkitError(f"{field} is '{path}', which holds no tokenizer that loads: {reason(error)}") from None
    if not tokenizer.is_fast:
        raise ToolkitError(f"{field} is '{path}'; it must hold a fast tokenizer (tokenizer.json).")
    if tokenizer.eos_token_id is None:
        raise ToolkitError(f"{field} is '{path}', whose tokenizer has no eos token; training needs one.")
    return tokenizer


def make_tokenizer(
    section: TokenizerSection, model_path: str | None, texts: Iterable[str], max_length: int
) -> Tokenizer:
    """``tokenizer.name_or_path``, else the tokenizer beside ``model.name_or_path``, else one trained on ``texts``."""
    if section.name_or_path is not None:
        return load_tokenizer(section.name_or_path)
    if model_path is not None:
        return load_tokenizer(model_path, "model.name_or_path")
    return train_tokenizer(texts, section.vocab_size, max_length)


def reason(error: Exception) -> str:
    """The first telling line of an exception of transformers, as the end of a sentence."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    telling = lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]
    return re.sub(r"^\w*Error: ", "", telling).rstrip(".") + "."
