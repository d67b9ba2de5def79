"""Loads the native CPU library that fits this machine, if the package was built with one.

``TOOLKIT_NATIVE=off`` runs on the reference implementations; ``TOOLKIT_NATIVE=/some/folder`` takes the
libraries from there instead of from the package. ``TOOLKIT_BFLOAT16=widen`` multiplies bfloat16 in float32 where the
processor has an instruction for it.
"""

import os
import warnings
from functools import cache
from pathlib import Path

import torch

_FITTING = {"AVX512": ("avx512", "avx2", "baseline"), "AVX2": ("avx2", "baseline")}  # of what torch finds


@cache
def load() -> str | None:
    """Load the library once; the instruction set it was compiled for, or None when there is none.

    ``baseline`` runs anywhere; ``avx2`` needs AVX2 and FMA; ``avx512`` uses AVX-512 F and DQ for GEMMs and is bitwise
    identical to ``avx2``. ``ATEN_CPU_CAPABILITY=avx2`` bounds it as it bounds torch. Says once, in one line, when
    it is missing.
    """
    folder = _folder()
    if folder is None:
        return None
    reason = "it was not built: no C++ compiler when the package was installed"
    for name in _FITTING.get(torch.backends.cpu.get_cpu_capability(), ("baseline",)):
        path = folder / f"{name}.so"
        if path.exists():
            try:
                torch.ops.load_library(str(path))
                return name
            except OSError as error:  # built against another torch
                reason = str(error).splitlines()[0]
    warnings.warn(f"toolkit runs on its reference kernels: the native CPU library is missing ({reason}).", stacklevel=2)
    return None


def path() -> Path | None:
    """The file of the library that ``load`` loaded."""
    name, folder = load(), _folder()
    return None if name is None or folder is None else folder / f"{name}.so"


def _folder() -> Path | None:
    setting = os.environ.get("TOOLKIT_NATIVE", "")
    return None if setting == "off" else Path(setting) if setting else Path(__file__).parent


def family(dtype: torch.dtype) -> str:
    """The instructions that GEMMs of this dtype use in this process, for any number of rows; what their bits depend on.

    Returns:
        "vdpbf16ps": bfloat16 by AVX512-BF16, two terms at a time.
        "vector": multiply-adds in float32 or float64; 16-bit numbers are upcast.
        "reference": torch's, without a native library.
    """
    if load() is None:
        return "reference"
    # A library built from older sources lacks it, and widens.
    multiplies_pairs = getattr(torch.ops.toolkit_native, "multiplies_pairs", None)
    return "vdpbf16ps" if dtype == torch.bfloat16 and multiplies_pairs and multiplies_pairs() else "vector"
