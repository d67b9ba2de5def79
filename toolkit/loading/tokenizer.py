"""The tokenizer beside a model."""

from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError, first_line
from toolkit.loading.gguf_pre_tokenizers import restore_pre_tokenizer
from toolkit.loading.source import Source, find_source, read_json
from toolkit.loading.tekken import TEKKEN, load_tekken

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
"""Any of which transformers makes a tokenizer of."""
PROCESSOR_TEMPLATE = "chat_template.json"
"""Where processors of older releases keep the chat template."""


def find_tokenizer(name_or_path: str | Path, **options: Any) -> Source:
    """The source of a tokenizer: as ``find_source``, but a folder with a tokenizer needs no model."""
    folder = Path(name_or_path)
    if _holds_tokenizer(folder):
        return Source(folder, trust_remote_code=options.get("trust_remote_code", False))
    return find_source(name_or_path, **options)


def _holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*FILES, TEKKEN))


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of a source, of adapters without one that of their base model; None where there is none.

    Raises:
        ToolkitError: it does not load, or is SentencePiece of Mistral's alone (``tokenizer.model.v3``).
    """
    folder = source.folder
    if source.gguf is None and not _holds_tokenizer(folder):
        if source.base is not None:
            return load_tokenizer(source.base)
        for file in sorted(folder.glob("tokenizer.model.v*")):  # transformers reads SentencePiece of Mistral's wrongly
            raise ToolkitError(f"'{folder}' has {file.name} alone; put the model's tokenizer.json beside it.")
        return None

    from transformers import AutoTokenizer

    has_tekken = (folder / TEKKEN).is_file()
    # Where mistral-common is installed, transformers would take its class, which has no tokenizer of the Rust library.
    options = source.options | ({"mistral_format": False} if has_tekken else {})
    try:
        if has_tekken and not any((folder / name).is_file() for name in FILES):
            tokenizer = load_tekken(folder / TEKKEN)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except ToolkitError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise ToolkitError(f"The tokenizer in '{folder}' cannot be loaded ({first_line(error)}).") from None
    if source.gguf is not None:
        restore_pre_tokenizer(tokenizer, folder / source.gguf)
    if tokenizer.chat_template is None and (folder / PROCESSOR_TEMPLATE).is_file():
        tokenizer.chat_template = read_json(folder / PROCESSOR_TEMPLATE).get("chat_template")
    tokenizer.chat_template = _without_mark(tokenizer.chat_template)
    return tokenizer


def _without_mark(template: Any) -> Any:
    """A template, or several by name, without the byte order mark of its file, which would begin every text."""
    if isinstance(template, dict):
        return {name: _without_mark(one) for name, one in template.items()}
    return template.removeprefix("\ufeff") if isinstance(template, str) else template
