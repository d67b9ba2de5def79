"""``rotary_write`` in Triton sums a row's squares in the order of ``rms_norm``: the compiler gives both one layout.

The order in which a tile is summed follows from its shape and from which of its elements a lane holds. Without a GPU
the bits cannot be compared; the layouts of the compiled kernels can.
"""

import re
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from tests.helpers.compiler import Compiler
from tools.compile_kernels import compiler as kernels

TOKENS, HEADS, KV_HEADS = 64, 8, 2


def summed_layouts(call: Callable[[], None], arch: str) -> set[tuple[str, str]]:
    """(shape and dtype, layout) of each sum in the one kernel that ``call`` launches."""
    import triton
    from triton.compiler import ASTSource

    with kernels.recording(arch) as launches:
        call()
    (launch,) = launches
    source = ASTSource(launch.kernel, *kernels.specialised(launch))
    made = triton.compile(source, target=kernels.target_of(arch), options=launch.options).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", made, re.MULTILINE))
    sums = re.findall(r'"tt\.reduce".*?\}\) : \(tensor<([^,>]*), (#\w+)>\)', made, re.DOTALL)
    return {(shape, layouts[layout]) for shape, layout in sums}


def both(width: int, dtype: torch.dtype, arch: str, joined: bool) -> tuple[set, set]:
    """Of ``rms_norm`` over heads, and of ``rotary_write`` of parts of one projection (``joined``) or of three."""
    from toolkit.ops.rms_norm.triton import rms_norm
    from toolkit.ops.rotary_write.triton import rotary_write

    weight, table = torch.empty(width, dtype=dtype), torch.empty(TOKENS, width, dtype=dtype)
    pool, slots = torch.empty(2 * TOKENS, KV_HEADS, width, dtype=dtype), torch.empty(TOKENS, dtype=torch.int64)
    sizes = [HEADS * width, KV_HEADS * width, KV_HEADS * width]
    rows = torch.empty(TOKENS, sum(sizes), dtype=dtype).split(sizes, 1)
    q, k, v = rows if joined else [x.contiguous() for x in rows]
    heads = torch.empty(TOKENS, HEADS, width, dtype=dtype)
    return (
        summed_layouts(lambda: rms_norm(heads, weight, 1e-6, 0.0), arch),
        summed_layouts(
            lambda: rotary_write(q, k, v, weight, weight, 1e-6, 0.0, table, table, False, pool, pool, slots), arch
        ),
    )


@pytest.mark.sweep
def test_a_row_is_summed_in_the_order_of_rms_norm(tmp_path):
    compiler = Compiler(str(tmp_path))
    try:
        for width, dtype, joined in ((128, torch.bfloat16, True), (72, torch.float32, False)):
            for arch in ("sm_90", "gfx942"):
                norm, fused = compiler.run(both, width, dtype, arch, joined)
                assert len(norm) == 1
                assert fused == norm, (width, dtype, arch, joined)
    finally:
        compiler.pool.shutdown()
