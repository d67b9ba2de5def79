"""Tensors that lie one after another in one allocation, each with a storage that ends where it does.

Views of one tensor share its storage, and whoever looks for tied weights goes by storages: accelerate deletes all names
but one of those that share one when it saves, safetensors' ``save_model`` refuses them, transformers copies them. So
each part has a storage over its own bytes; what keeps the allocation is the last part to go.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.ops import native
from toolkit.ops.transforms import transformed

_PLAIN = {Tensor, torch.nn.Parameter}


def placed_together(parts: Sequence[Tensor]) -> list[Tensor]:
    """Copies of ``parts``, in their order, one directly behind the other in one allocation.

    Args:
        parts: on one device, in one dtype; equal in all dimensions but the first.

    Returns:
        Contiguous tensors without gradient. Each has a storage of as many bytes as it has itself.
    """
    with torch.no_grad():
        whole = torch.cat([part.detach() for part in parts])
        return [torch.from_dlpack(part) for part in whole.split([len(part) for part in parts])]


def lie_together(parts: Sequence[Tensor]) -> bool:
    """Whether ``parts`` are plain and contiguous, and each begins at the byte at which the one before it ends.

    Their addresses say so, which are read at every call: whoever gives a part other memory need tell nobody.
    """
    first = parts[0]
    end = first.data_ptr() if type(first) in _PLAIN else 0
    if not end:  # a meta tensor, or freed memory
        return False
    dtype, device, inner = first.dtype, first.device, first.shape[1:]
    for part in parts:
        if type(part) not in _PLAIN or part.data_ptr() != end or part.dtype is not dtype:
            return False
        if not part.is_contiguous() or part.shape[1:] != inner or part.device != device:
            return False
        end += part.nbytes
    return True


def adjoining(parts: Sequence[Tensor]) -> Tensor | None:
    """``cat(parts)`` as a view of their memory, which it does not keep alive: they must outlive it.

    None where they do not ``lie_together``, without the native library, and where a tracer or a transform of
    ``torch.func`` must follow.
    """
    if not parts or torch.compiler.is_compiling() or transformed() or native.load() is None:
        return None
    function = getattr(torch.ops.toolkit_native, "adjoining", None)  # a library of older sources lacks it
    return None if function is None else function(list(parts))
