"""The tokenizer of a checkpoint of Mistral's that has ``tekken.json`` alone."""

from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError

TEKKEN = "tekken.json"


def load_tekken(file: Path) -> Any:
    """A tokenizer of transformers for ``tekken.json``, with ``<s>`` before texts as Mistral's own has.

    Its chat template is that of ``chat_template.jinja`` or ``chat_template.json`` beside it, else the one that the
    package mistral-common makes of the tokenizer's version, else None.

    Raises:
        ToolkitError: a file of 2024, which names no special tokens, without mistral-common.
    """
    from tokenizers import processors
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    try:
        tokenizer = convert_tekken_tokenizer(str(file))
    except ImportError:
        raise ToolkitError(f"Reading '{file}' needs the package mistral-common: pip install mistral-common.") from None
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
            ),
        ]
    )
    return tokenizer
