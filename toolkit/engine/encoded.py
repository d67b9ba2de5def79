"""The pictures of a step, encoded."""

import torch

from toolkit.engine.media import EncoderCache
from toolkit.engine.request import Request
from toolkit.engine.scheduler import Chunk
from toolkit.errors import described
from toolkit.state import PrefixKey
from toolkit.state.media import Features


def encoded(
    chunks: list[Chunk], cache: EncoderCache, weights: PrefixKey
) -> tuple[dict[bytes, Features], dict[Request, str]]:
    """(features by digest of the pictures that ``chunks`` take rows of, why requests failed whose are not encoded)."""
    failed: dict[Request, str] = {}
    features: dict[bytes, Features] = {}
    taken: set[tuple[bytes, str | None]] = set()
    for chunk in chunks:
        request, salt = chunk.sequence.request, chunk.sequence.params.cache_salt
        if request.media is None or request in failed:
            continue
        try:
            with torch.inference_mode():
                for digest in request.media.digests(chunk.start, chunk.count):
                    if (digest, salt) not in taken:
                        features[digest] = cache.get(digest, request.media.items[digest], weights, salt)
                        taken.add((digest, salt))
        except Exception as error:
            failed[request] = described(error)
    return features, failed
