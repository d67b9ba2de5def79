"""The recipe's tokenizer: a Hugging Face tokenizer, loaded, or byte-level BPE trained by the run."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from toolkit import loading
from toolkit.config.schema import ModelSection, TokenizerSection
from toolkit.errors import ToolkitError
from toolkit.loading import find_tokenizer
from toolkit.training.progress import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer: TypeAlias = PreTrainedTokenizerBase
else:
    Tokenizer = Any

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> Tokenizer:
    """Byte-level BPE over the texts: lossless for any UTF-8 text, one special token (eos, also bos and pad).

    The same texts give the same tokenizer. ``max_length`` becomes its ``model_max_length``.
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


def load_tokenizer(
    name_or_path: str | Path,
    field: str = "tokenizer.name_or_path",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Tokenizer:
    """The tokenizer of a folder, a run or a repository of the Hub.

    Raises ToolkitError, naming ``field``, where there is none or it has no eos token.
    """
    source = find_tokenizer(name_or_path, revision=revision, trust_remote_code=trust_remote_code, field=field)
    tokenizer: Tokenizer = loading.load_tokenizer(source)
    if tokenizer is None:
        raise ToolkitError(
            f"{field} must hold a tokenizer, got '{name_or_path}', which has none; name one with "
            "tokenizer.name_or_path=."
        )
    if tokenizer.eos_token_id is None:
        raise ToolkitError(f"{field} must hold a tokenizer with an eos token, got '{name_or_path}'.")
    return tokenizer


def make_tokenizer(section: TokenizerSection, model: ModelSection, texts: Iterable[str], max_length: int) -> Tokenizer:
    """``tokenizer.name_or_path``, else the tokenizer of ``model.name_or_path``, else one trained on ``texts``.

    It gets ``tokenizer.added_tokens``.
    """
    if section.name_or_path is not None:
        found = load_tokenizer(section.name_or_path)
    elif model.name_or_path is not None:
        found = load_tokenizer(model.name_or_path, "model.name_or_path", model.revision, model.trust_remote_code)
    else:
        found = train_tokenizer(counted(texts, None, "tokenizer: texts read"), section.vocab_size, max_length)
    found.add_tokens(list(section.added_tokens), special_tokens=True)
    return found


def set_chat_template(tokenizer: Tokenizer, given: str | None) -> None:
    """Let the tokenizer have ``objective.chat_template``: Jinja text, a file with it, or the name of one that it has.

    Raises ToolkitError for anything else. None leaves its own.
    """
    if given is not None:
        tokenizer.chat_template = _template(given, tokenizer)


def _template(given: str, tokenizer: Tokenizer) -> str:
    if "{" in given:
        return given
    named = tokenizer.chat_template
    if isinstance(named, dict) and given in named:
        return str(named[given])
    try:
        return Path(given).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError):
        raise ToolkitError(
            f"objective.chat_template must be Jinja text, a file with it or a template of the tokenizer, got '{given}'."
        ) from None
