"""quantised_linear has the bits of ``linear`` with the dequantised weight, forward and gradients, for any rows."""

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.implementations import REFERENCE, TRITON, implementations
from tests.helpers.quantised import VARIANTS, packed
from tests.helpers.rowwise import seeded
from toolkit.errors import ToolkitError
from toolkit.ops import native
from toolkit.ops.linear import linear, linear_group
from toolkit.ops.quantised_linear import dequantise, find, quantised_linear, quantised_linear_group
from toolkit.ops.quantised_linear.packing import pack_codes
from toolkit.ops.registry import has_native

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROWS = [0, 1, 2, 7, 8, 9, 16, 17, 33, 200]
SIZES = [(1, 1), (17, 77), (64, 256), (100, 521)]  # odd, K of one block and of several, no multiple of words or groups
needs_native = pytest.mark.skipif(not has_native("quantised_linear"), reason="needs the native kernels")


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("threads", [1, 2])
def test_has_the_bits_of_linear_with_the_dequantised_weight(variant, dtype, threads):
    torch.set_num_threads(threads)
    for outputs, inputs in SIZES:
        name, codes, scales = packed(variant, outputs, inputs)
        weight = dequantise(codes, scales, name, outputs, inputs, dtype)
        for rows in ROWS:
            x = seeded(rows, inputs, dtype=dtype, seed=rows)
            bias = seeded(outputs, dtype=dtype, seed=9) if rows % 2 else None
            got = quantised_linear(x, codes, scales, bias, name, outputs)
            assert got.dtype == dtype
            assert torch.equal(got, linear(x, weight, bias)), (outputs, inputs, rows)


@needs_native
@pytest.mark.parametrize("variant", VARIANTS)
def test_threads_share_out_a_large_weight(variant):
    """Several blocks of a sum and of rows, forward and to x; a stride of 4 KiB."""
    outputs, inputs = 1100, 1024
    name, codes, scales = packed(variant, outputs, inputs)
    for dtype in (torch.float32, torch.bfloat16):
        weight = dequantise(codes, scales, name, outputs, inputs, dtype)
        for rows in (1, 5, 16, 40, 400):
            x = seeded(rows, inputs, dtype=dtype, seed=rows).requires_grad_()
            grad = seeded(rows, outputs, dtype=dtype, seed=3)
            y = linear(x, weight)
            y.backward(grad)
            wanted, x.grad = x.grad, None
            for threads in (1, 2):
                torch.set_num_threads(threads)
                got = quantised_linear(x, codes, scales, None, name, outputs)
                got.backward(grad)
                assert torch.equal(got, y)
                assert torch.equal(x.grad, wanted)
                x.grad = None


@needs_native
def test_scales_of_int8_may_be_tiny():
    """Products that a scale of 2^-24 times the size would round differently."""
    codes = pack_codes(torch.arange(-8, 8, dtype=torch.int8).view(1, 16).repeat(2, 1), 8)
    scale = torch.full((1, 1, 16), 1.0)
    scale[0, 0, 0], scale[0, 0, 1] = 1.2345e-38, 1.2345e-33
    weight = dequantise(codes, [scale], "int8", 2, 16, impl="reference")
    assert torch.equal(dequantise(codes, [scale], "int8", 2, 16), weight)
    for rows in (1, 40):
        x = seeded(rows, 16, dtype=torch.float32)
        assert torch.equal(quantised_linear(x, codes, [scale], None, "int8", 2), linear(x, weight))


@needs_native
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads the kernel's count of resident memory")
def test_many_rows_make_no_dense_weight():
    """The most memory that a forward and a backward take is far less than a float32 weight."""
    size = 4096
    codes = torch.zeros(size // 16, size // 8, 16, dtype=torch.int32)
    scales = [
        torch.ones(size // 16, size // 128, 16).half(),
        torch.ones(size // 16, size // 128, 16, dtype=torch.uint8),
    ]

    def step(rows):
        x = torch.ones(rows, size, requires_grad=True)
        quantised_linear(x, codes, scales, None, "int4", size).backward(torch.ones(rows, size))

    step(17)  # a thread's own memory
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    step(64)
    assert resident("VmHWM") - before < size * size * 4 / 4


def resident(name: str) -> int:
    """Bytes of one line of this process's /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


@implementations(REFERENCE, TRITON)
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_implementations_are_linear_of_the_dequantised_weight(impl, variant):
    name, codes, scales = packed(variant, 17, 77)
    device = torch.get_default_device()
    codes, scales = codes.to(device), [scale.to(device) for scale in scales]
    dtype = impl.dtypes[-1]
    weight = dequantise(codes, scales, name, 17, 77, dtype, impl=impl.option)
    for rows in (1, 5):
        x, bias = seeded(rows, 77, dtype=dtype), seeded(17, dtype=dtype)
        got = quantised_linear(x, codes, scales, bias, name, 17, impl=impl.option)
        assert torch.equal(got, linear(x, weight, bias, impl=impl.option))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_have_the_bits_of_those_of_linear(variant, dtype):
    for outputs, inputs in SIZES:
        name, codes, scales = packed(variant, outputs, inputs)
        weight = dequantise(codes, scales, name, outputs, inputs, dtype)
        for rows in (0, 1, 9, 40):
            both = []
            for quantised in (True, False):
                x = seeded(rows, inputs, dtype=dtype, seed=rows).requires_grad_()
                bias = seeded(outputs, dtype=dtype, seed=9).requires_grad_()
                y = (
                    quantised_linear(x, codes, scales, bias, name, outputs) if quantised else linear(x, weight, bias)
                )  # fmt: skip
                y.backward(seeded(rows, outputs, dtype=dtype, seed=3))
                both.append((x.grad, bias.grad))
            assert all(torch.equal(*pair) for pair in zip(*both)), (outputs, inputs, rows)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("impl", ["reference", None])
def test_matches_double(variant, impl):
    """Values and gradients of float32 against the dequantised weight in float64."""
    name, codes, scales = packed(variant, 33, 300)
    weight = dequantise(codes, scales, name, 33, 300, torch.float64, impl="reference")
    x = seeded(7, 300, dtype=torch.float32).requires_grad_()
    grad = seeded(7, 33, dtype=torch.float32, seed=3)
    y = quantised_linear(x, codes, scales, None, name, 33, impl=impl)
    y.backward(grad)
    y = y.detach()
    exact, to_x = x.detach().double() @ weight.T, grad.double() @ weight
    assert float((y - exact).abs().max()) <= 2e-6 * float(exact.abs().max())
    assert float((x.grad - to_x).abs().max()) <= 2e-6 * float(to_x.abs().max())


def test_only_the_gradients_asked_for():
    name, codes, scales = packed("int4", 17, 77)
    for wanted in range(1, 4):
        x = seeded(3, 77, dtype=torch.float32).requires_grad_(bool(wanted & 1))
        bias = seeded(17, dtype=torch.float32).requires_grad_(bool(wanted & 2))
        quantised_linear(x, codes, scales, bias, name, 17).sum().backward()
        assert [x.grad is not None, bias.grad is not None] == [bool(wanted & 1), bool(wanted & 2)]


@pytest.mark.parametrize("impl", ["reference", None])
def test_layouts_of_the_inputs_change_no_bit(impl):
    name, codes, scales = packed("int4", 40, 200)
    x, bias = seeded(6, 200, dtype=torch.float32), seeded(40, dtype=torch.float32)
    flat = quantised_linear(x, codes, scales, bias, name, 40, impl=impl)
    spaced = torch.stack([x, x], 2)[..., 0]
    twice = [torch.stack([part, part], -1)[..., 0] for part in (codes, *scales)]
    got = quantised_linear(spaced, twice[0], twice[1:], torch.stack([bias, bias], 1)[:, 0], name, 40, impl=impl)
    assert torch.equal(got, flat)
    assert torch.equal(
        quantised_linear(x.view(2, 3, 200), codes, scales, bias, name, 40, impl=impl), flat.view(2, 3, 40)
    )
    assert torch.equal(quantised_linear(x[0], codes, scales, bias, name, 40, impl=impl).view(1, -1), flat[:1])


@needs_native
@pytest.mark.parametrize("rows", [0, 1, 5, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_has_the_bits_of_its_members(dtype, rows):
    members = [(variant, 20 * i + 1) for i, variant in enumerate(VARIANTS)]
    parts = [packed(variant, outputs, 300, seed=outputs) for variant, outputs in members]
    outputs = [width for _, width in members]
    biases = [seeded(width, dtype=dtype) if i % 2 else None for i, width in enumerate(outputs)]
    x = seeded(rows, 300, dtype=dtype)
    names, codes, scales = zip(*parts)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got = quantised_linear_group(x, codes, scales, biases, names, outputs)
        weights = [dequantise(c, s, n, width, 300, dtype) for n, c, s, width in zip(*zip(*parts), outputs)]
        assert all(torch.equal(*pair) for pair in zip(got, linear_group(x, weights, biases), strict=True))


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
def test_a_nan_stays_where_it_belongs(rows):
    """A NaN of x in its row, one among the codes in its output; padding is not read."""
    name, codes, scales = packed("fp8", 21, 100)
    x = seeded(rows, 100, dtype=torch.float32)
    clean = quantised_linear(x, codes, scales, None, name, 21)
    bad_row = x.clone()
    bad_row[rows // 2, 7] = float("nan")
    bad_codes = codes.clone()
    bad_codes.view(torch.uint8)[1, 99 // 4, 3, 99 % 4] = 0xFF  # output 19, k = 99
    for case in (
        quantised_linear(bad_row, codes, scales, None, name, 21),
        quantised_linear(x, bad_codes, scales, None, name, 21),
    ):
        hit = case.isnan()
        assert torch.equal(case[~hit], clean[~hit])
        assert bool(hit.any())
    assert torch.equal(
        quantised_linear(x, bad_codes, scales, None, name, 21).isnan().sum(0).nonzero(), torch.tensor([[19]])
    )


@pytest.mark.parametrize("rows", [1, 40])
def test_subnormal_numbers_of_fp8_survive_a_processor_that_flushes_them(rows):
    numbers = torch.arange(8, dtype=torch.uint8)
    codes, scales = pack_codes(numbers.view(1, 8).view(torch.float8_e4m3fn), 8), [torch.full((1, 1, 16), 512.0)]
    assert torch.set_flush_denormal(True)
    try:
        weight = dequantise(codes, scales, "fp8", 1, 8)
        got = quantised_linear(torch.eye(8)[:rows].repeat(5, 1), codes, scales, None, "fp8", 1)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(weight[0], numbers.float())
    assert torch.equal(got[: min(rows, 8), 0], numbers[:rows].float())


PRODUCTS = """
import sys
import torch
from tests.helpers.quantised import VARIANTS, packed
from toolkit.ops import native
from toolkit.ops.linear import linear
from toolkit.ops.quantised_linear import dequantise, quantised_linear
results = [native.load()]
for variant in VARIANTS:
    for outputs, inputs in ((1, 1), (33, 77), (100, 521)):
        name, codes, scales = packed(variant, outputs, inputs)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = dequantise(codes, scales, name, outputs, inputs, dtype)
            results.append(weight)
            for rows in (1, 2, 3, 4, 7, 9, 40):
                x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).to(dtype)
                results.append(quantised_linear(x, codes, scales, None, name, outputs))
                assert torch.equal(results[-1], linear(x, weight))
torch.save(results, sys.argv[1])
"""


@pytest.mark.sweep
@pytest.mark.skipif(native.load() != "avx512", reason="needs a machine with AVX-512")
@needs_native
def test_avx512_has_the_bits_of_avx2(tmp_path):
    """With bfloat16 upcast in both: products of pairs have other bits, and only AVX-512 has them."""
    kept = []
    for capability in ("avx2", "avx512"):
        out = tmp_path / f"{capability}.pt"
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "TOOLKIT_BFLOAT16": "widen"}
        subprocess.run([sys.executable, "-c", PRODUCTS, str(out)], check=True, env=environment)
        name, *results = torch.load(out)
        assert name == capability
        kept.append(results)
    assert len(kept[0]) == len(kept[1]) > 100
    for avx2, avx512 in zip(*kept):
        assert torch.equal(avx2, avx512)


@pytest.mark.parametrize("impl", ["reference", None])
def test_bad_input_is_one_sentence(impl):
    name, codes, scales = packed("int4", 17, 77)
    x = torch.ones(2, 77)
    for match, arguments in (
        ("format", (x, codes, scales, None, "int5", 17)),
        ("codes must be", (x[:, :60], codes, scales, None, name, 17)),
        ("codes must be", (x, codes, scales, None, name, 33)),
        ("codes must be", (x, codes.float(), scales, None, name, 17)),
        ("scales must be 2 tensors, got 1", (x, codes, scales[:1], None, name, 17)),
        ("zero must be", (x, codes, [scales[0], scales[1].int()], None, name, 17)),
        ("scale|zero", (x, codes, [scales[0][:, :1], scales[1]], None, name, 17)),
    ):
        with pytest.raises((ToolkitError, RuntimeError), match=match):
            quantised_linear(*arguments, impl=impl)
    with pytest.raises((ToolkitError, RuntimeError)):
        quantised_linear(x, codes, scales, torch.ones(16), name, 17, impl=impl)


def test_registration_is_sound():
    name, codes, scales = packed("nf4", 17, 77)
    x, bias, grad = (seeded(*shape, dtype=torch.float32) for shape in ((3, 77), (17,), (3, 17)))
    ops = torch.ops.toolkit
    for needs, shift in ((True, bias), (False, None)):
        inputs = x.detach().requires_grad_(needs), codes, scales, shift, name, 17
        torch.library.opcheck(ops.quantised_linear.default, inputs)
    torch.library.opcheck(ops.quantised_linear_backward.default, (grad, codes, scales, name, 77, True, True))
    group = x, [codes], scales, [len(scales)], [None], [name], [17]
    torch.library.opcheck(ops.quantised_linear_group.default, group)
    torch.library.opcheck(ops.dequantise.default, (codes, scales, name, 17, 77, torch.bfloat16))


def test_compiles_in_one_graph():
    name, codes, scales = packed("nf4", 17, 77)
    assert find(name).bits == 4

    def loss(x):
        return quantised_linear(x, codes, scales, None, name, 17).square().sum()

    x = seeded(3, 77, dtype=torch.float32).requires_grad_()
    loss(x).backward()
    eager, x.grad = x.grad, None
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    assert torch.equal(x.grad, eager)
