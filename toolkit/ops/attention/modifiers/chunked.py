"""chunked: a query sees the keys of its chunk of positions (Llama 4, 2025); the parameter is the chunk's size."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl


def visible(query: Tensor, key: Tensor, chunk: Tensor) -> Tensor:
    size = chunk.long()
    return query // size == key // size


def first(query: Tensor, chunk: Tensor) -> Tensor:
    size = chunk.long()
    return query // size * size


def triton_visible(query, key, p):
    size = tl.load(p).to(tl.int32)
    return key >= query // size * size  # keys after the query are never seen
