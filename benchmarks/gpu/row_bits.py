"""Whether this device's own GEMM is batch-invariant: do a row's bits depend on how many rows it is called with?

Where no call changes a row's bits with split-K forbidden, ``linear`` in bitwise mode may be the cuBLAS GEMM on this
device, for these shapes and this version of the library; where one does, the Triton kernel stays.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import print_table
from benchmarks.gpu.device import DRY, HALF, normal
from benchmarks.gpu.section import Section

# (K, N) of a Qwen3-4B's layers and head.
SHAPES = (
    [(48, 40)] if DRY else [(2560, 4096), (2560, 1024), (4096, 2560), (2560, 9728), (9728, 2560), (2560, 151936)]
)  # fmt: skip
ROWS = 24 if DRY else 512
COUNTS = [1, 2, 8] if DRY else [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 192, 256, 511]
# name -> (allow_bf16_reduced_precision_reduction and the same of fp16, preferred_blas_library)
SETTINGS: dict[str, tuple[Any, str]] = {
    "as it is": (None, "default"),
    "cublas, no split-K": ((False, False), "cublas"),
    "cublaslt, no split-K": ((False, False), "cublaslt"),
}


@contextmanager
def library(reduction: Any, preferred: str) -> Iterator[None]:
    """torch's GEMMs with these settings. ``(False, False)`` forbids reductions in 16 bits, and split-K."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    chosen = torch.backends.cuda.preferred_blas_library() if not DRY else None
    try:
        if reduction is not None:
            for name in names:
                setattr(matmul, name, reduction)
        if not DRY:
            torch.backends.cuda.preferred_blas_library(preferred)
        yield
    finally:
        for name, value in zip(names, before):
            setattr(matmul, name, value)
        if chosen is not None:
            torch.backends.cuda.preferred_blas_library(chosen)


def differing_calls(depth: int, outputs: int) -> dict[str, list[int]]:
    """Numbers of rows for which some row's bits are not those of a call with ROWS: alone at the front, and at the end
    with other neighbours; ``repeat``: a second call of the same."""
    x, weight = normal(ROWS, depth), normal(outputs, depth, scale=depth**-0.5)
    whole = F.linear(x, weight)
    found: dict[str, list[int]] = {"first": [], "last": [], "repeat": []}
    if not torch.equal(F.linear(x, weight), whole):
        found["repeat"].append(ROWS)
    for count in COUNTS:
        if not torch.equal(F.linear(x[:count], weight), whole[:count]):
            found["first"].append(count)
        if not torch.equal(F.linear(x[ROWS - count :], weight), whole[ROWS - count :]):
            found["last"].append(count)
    return found


def bench_row_bits(section: Section) -> None:
    """Numbers of rows that change bits, by setting and shape."""
    for setting, (reduction, preferred) in SETTINGS.items():
        entry = section.result[setting] = {}
        for depth, outputs in SHAPES:
            label = f"{depth} -> {outputs}"
            if section.allows(f"{setting}, {label}", 0.5):
                with section.trying(f"{setting}, {label}"), torch.no_grad(), library(reduction, preferred):
                    entry[label] = differing_calls(depth, outputs)
    section.result["verdict"] = verdict(section.result)


def verdict(result: dict[str, Any]) -> str:
    """What the probe says about ``linear`` in bitwise mode."""
    fit = [
        setting
        for setting in SETTINGS
        if len(result.get(setting, {})) == len(SHAPES)
        and not any(any(found.values()) for found in result[setting].values())
    ]
    if not fit:
        return "the cuBLAS GEMM is not batch-invariant here: bitwise mode keeps the Triton kernel"
    return f"no row changed with {ROWS} rows, {HALF}: bitwise mode may use the cuBLAS GEMM, with {' or '.join(fit)}"


def show(result: dict[str, Any], ceilings: dict[str, float]) -> None:
    rows = []
    for setting in SETTINGS:
        for label, found in result[setting].items():
            changed = sorted({*found["first"], *found["last"]})
            rows.append([setting, label, f"{len(changed)} of {len(COUNTS)}", str(changed), bool(found["repeat"])])
    title = f"cuBLAS GEMM: {result['verdict']}"
    print_table(title, ["setting", "K -> N", "differ", "numbers of rows", "repeat differs"], rows)
