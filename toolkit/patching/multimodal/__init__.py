"""Images, videos and sounds through a patched model: its own tower and merging, rows of ragged batches as embeddings.

In reading order: ``entry``, where features come in; ``items`` of a processor's outputs; ``encoding`` them;
``sequences`` with positions and spans; ``check``, the proof against the model's own forward; ``media``, what callers
use.
"""

from toolkit.patching.multimodal.items import Item
from toolkit.patching.multimodal.media import encode, expand, media_batch, span_layers, takes_media
from toolkit.patching.multimodal.sequences import MediaSequence

__all__ = ["Item", "MediaSequence", "encode", "expand", "media_batch", "span_layers", "takes_media"]
