"""What torch does to the inputs of a matrix multiplication inside autocast, for ops that autocast does not know."""

import torch
from torch import Tensor


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, floating-point, in autocast's dtype inside autocast; float64 ones, and any outside it, as they are.

    Inside autocast q and k of attention may be float32, multiplied by rotary tables, where v is the 16-bit output of a
    linear layer. torch's own attention gets all three in autocast's dtype, and so does an eager one's GEMM.
    """
    if not tensors or not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)
