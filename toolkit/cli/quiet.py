"""Keeps notices of other libraries that tell the user nothing off the terminal."""

import logging
import os
import warnings

# logger -> parts of the messages that are dropped.
NOTICES = {
    "DeepSpeed": ("Setting accelerator to CPU", "Setting ds_accelerator to"),
    "transformers.tokenization_utils_base": ("Token indices sequence length is longer",),
    "transformers.integrations.hub_kernels": ("is falling back to its reference PyTorch implementation",),
    "torch.distributed.elastic.multiprocessing.redirects": ("NOTE: Redirects are currently not supported",),
    "torchao": ("Skipping import of cpp extensions",),
}
# Starts of warnings that are dropped.
WARNINGS = (
    "Setting `save_embedding_layers` to `True`",
    "'pin_memory' argument is set as true but no accelerator is found",
)


class Without(logging.Filter):
    """Drops records whose message has one of ``parts`` in it."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = parts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(part in message for part in self.parts)


def silence_libraries() -> None:
    """Drop the notices in this process; call it before the libraries are imported. Errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name, parts in NOTICES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, Without) for one in logger.filters):
            logger.addFilter(Without(parts))
    for start in WARNINGS:
        warnings.filterwarnings("ignore", message=start)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
