"""Formats of GGUF weights, and which of them each tensor gets."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType

FORMATS = ("f32", "bf16", "f16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0")
K_QUANTS = ("q6_k", "q5_k", "q4_k")
WEIGHTED = (*K_QUANTS, "q4_0")
"""Formats whose scales may be chosen by importances of columns (``importance.py``)."""
_FALLBACK = {"q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0"}
"""Of rows that 256 does not divide, as llama.cpp's own converter chooses."""
FILE_TYPES = {
    "f32": "ALL_F32",
    "bf16": "MOSTLY_BF16",
    "f16": "MOSTLY_F16",
    "q8_0": "MOSTLY_Q8_0",
    "q6_k": "MOSTLY_Q6_K",
    "q5_k": "MOSTLY_Q5_K_S",
    "q4_k": "MOSTLY_Q4_K_S",
    "q4_0": "MOSTLY_Q4_0",
}
_SCALED = ("q4_0", "q5_0", "q5_1")
"""Other formats whose scales libgguf chooses by importances."""
_KEPT = ("ffn_gate_inp", "shortconv.conv", "ssm_conv1d")
"""Small tensors that llama.cpp reads as float32: routers and convolutions."""


def tensor_format(name: str, shape: tuple[int, ...], wanted: str, tied: bool) -> str:
    """The format of one tensor of a file whose format is ``wanted``.

    Vectors, routers and convolutions are float32. The head is at least Q6_K, since its errors reach every logit. Rows
    that blocks of 256 do not divide have the next format with blocks of 32, and without these either F16.

    Args:
        name: GGUF's name.
        shape: as torch has it; rows are the last dimension.
        tied: whether the embedding is the head, too.
    """
    if len(shape) < 2 or wanted == "f32" or any(part in name for part in _KEPT):
        return "f32"
    if wanted in ("bf16", "f16"):
        return wanted
    head = name == "output.weight" or (tied and name == "token_embd.weight")
    if head and wanted in ("q4_0", "q4_k", "q5_k"):
        wanted = "q6_k"
    if wanted in _FALLBACK and shape[-1] % 256:
        wanted = _FALLBACK[wanted]
    return wanted if shape[-1] % 32 == 0 else "f16"


def ggml_type(form: str) -> "GGMLQuantizationType":
    """GGML's number of a format."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[form.upper()]


def encoded(tensor: Tensor, form: str, importance: "np.ndarray | None" = None) -> "np.ndarray":
    """A tensor's bytes in a format, uint8 with the bytes of a row as last dimension; floats keep their dtype.

    importance: [matrices, columns] float32 that chooses scales (``importance.py``); None weighs all columns equally.
    """
    import numpy as np
    from gguf import quants

    values = tensor.detach().to(torch.float32).contiguous().numpy()
    if form == "f32":
        return values
    if form == "f16":
        return values.astype(np.float16)
    if form in K_QUANTS or (importance is not None and form in _SCALED):
        import libgguf

        weights = [None] if importance is None else list(importance)
        matrices = values.reshape(len(weights), -1, values.shape[-1])
        kind = int(ggml_type(form))
        rows = [libgguf.quantize_rows(one, kind, by) for one, by in zip(matrices, weights)]
        return np.stack(rows).reshape(*values.shape[:-1], -1)
    return quants.quantize(values, ggml_type(form))
