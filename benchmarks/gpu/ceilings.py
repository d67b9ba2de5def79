"""What this device reaches: bytes/s of a large copy, and FLOP/s of a large 16-bit product on random data."""

from typing import Any

import torch

from benchmarks.common import print_table
from benchmarks.gpu.device import DEVICE, DRY, HALF, median
from benchmarks.gpu.section import Section


def measured_ceilings() -> dict[str, float]:
    """bytes/s, counting those read and those written, and FLOP/s."""
    size, side = (64, 8) if DRY else (2**30, 8192)
    source = torch.randn(size, device=DEVICE, dtype=HALF)
    target = torch.empty_like(source)
    copied = median(lambda: target.copy_(source), 200)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=HALF) for _ in range(2))
    product = median(lambda: a @ b, 200)
    return {"copy_bytes_per_s": 2 * source.nbytes / copied, "bf16_flops_per_s": 2 * side**3 / product}


def bench_ceilings(section: Section) -> None:
    """The ceilings, which the other sections divide by."""
    section.result |= measured_ceilings()


def show(result: dict[str, Any], ceilings: dict[str, float]) -> None:
    rows = [
        ["copy, TB/s", result["copy_bytes_per_s"] / 1e12],
        ["bf16 product, TFLOP/s", result["bf16_flops_per_s"] / 1e12],
    ]
    print_table("Ceilings of this device", ["what", "reached"], rows)
