"""The formats of quantised weights: their values by the definition, their quantisers, and other libraries' values."""

import itertools

import numpy as np
import pytest
import torch

from tests.helpers.quantised import VARIANTS, packed
from tests.helpers.rowwise import integers, seeded
from toolkit.errors import ToolkitError
from toolkit.ops.dynamic_map import dynamic_map
from toolkit.ops.quantised_linear import FORMATS, dequantise, dequantise_rows, find, makers
from toolkit.ops.quantised_linear.formats import int4, nf4
from toolkit.ops.quantised_linear.packing import pack_codes, pack_groups, unpack_codes, unpack_groups

SIZES = [(1, 1), (16, 64), (17, 77), (33, 300)]


def code_of(codes: np.ndarray, bits: int, n: int, k: int) -> int:
    """The bits of the code of output n and input k, by the definition of the layout."""
    if bits == 8:
        return int(codes[n // 16, k // 4, n % 16, k % 4])
    return int(codes[n // 16, k // 8, n % 16]) >> 4 * (k % 8) & 15


def value_of(variant: str, code: int, scales: list[np.ndarray], n: int, g: int, groups: int) -> np.float32:
    """One weight by the definition of its format, one float32 operation after the other."""
    f, panel, lane = np.float32, n // 16, n % 16
    at = [scale[panel, g, lane] if scale.ndim == 3 and scale.shape[1] > g else None for scale in scales]
    name = VARIANTS[variant][0]
    if name in ("int8", "q8_0"):
        return f(code if code < 128 else code - 256) * f(at[0])
    if name == "int4":
        return (f(code) - f(at[1])) * f(at[0])
    if name == "fp8":
        sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
        magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        return f(-magnitude if sign else magnitude) * f(at[0])
    if name == "nf4":
        if len(scales) == 1:
            return f(nf4.VALUES[code]) * f(at[0])
        absmax = f(scales[3][at[0]]) * f(scales[1][(n * groups + g) // 256]) + f(scales[2])
        return f(nf4.VALUES[code]) * absmax
    d, dmin = (f(scale[panel, g // 8, lane]) for scale in scales[:2])
    return f(code) * (d * f(at[2])) - dmin * f(at[3])


def numpy_of(scale: torch.Tensor) -> np.ndarray:
    return (scale.float() if scale.dtype == torch.bfloat16 else scale).numpy()


@pytest.mark.parametrize("impl", ["reference", None])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_values_are_those_of_the_definition(impl, variant, outputs, inputs):
    name, codes, scales = packed(variant, outputs, inputs)
    one = find(name)
    got = dequantise(codes, scales, name, outputs, inputs, impl=impl)
    raw = codes.view(torch.uint8) if one.bits == 8 else codes
    parts = [numpy_of(scale) for scale in scales]
    group = one.group(scales, inputs)
    groups = -(-inputs // group)
    wanted = np.array(
        [
            [
                value_of(variant, code_of(raw.numpy(), one.bits, n, k), parts, n, k // group, groups)
                for k in range(inputs)
            ]
            for n in range(outputs)
        ]
    )
    assert wanted.dtype == np.float32
    assert np.array_equal(got.numpy(), wanted)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        rounded = dequantise(codes, scales, name, outputs, inputs, dtype, impl=impl)
        assert torch.equal(rounded, got.to(dtype))


@pytest.mark.parametrize("impl", ["reference", None])
def test_every_code_has_its_value(impl):
    """All 256 bytes of fp8, NaNs and subnormal numbers too, and all of the bytes and half bytes of the others."""
    bytes_ = torch.arange(256, dtype=torch.uint8).view(16, 16)
    ones = torch.ones(1, 1, 16)
    got = dequantise(
        pack_codes(bytes_.view(torch.float8_e4m3fn), 8), [ones], "fp8", 16, 16, impl=impl
    )  # fmt: skip
    assert torch.equal(got.nan_to_num(7e6), bytes_.view(torch.float8_e4m3fn).float().nan_to_num(7e6))
    assert int(got.isnan().sum()) == 2
    got = dequantise(pack_codes(bytes_.view(torch.int8), 8), [ones], "int8", 16, 16, impl=impl)
    assert torch.equal(got, bytes_.view(torch.int8).float())
    halves = torch.arange(16).expand(16, 16).contiguous()
    got = dequantise(pack_codes(halves, 4), [ones], "nf4", 16, 16, impl=impl)
    assert torch.equal(got, torch.tensor(nf4.VALUES).expand(16, 16))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_packing_is_undone(bits, outputs, inputs):
    codes = integers(0, 2**bits, outputs, inputs).to(torch.uint8)
    packed_codes = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(packed_codes, bits, outputs, inputs), codes)
    padding = unpack_codes(packed_codes, bits, -(-outputs // 16) * 16, inputs)[outputs:]
    assert not bool(padding.any())
    data = seeded(outputs, inputs)
    assert torch.equal(unpack_groups(pack_groups(data), outputs), data)


# Of a format: the largest error of a weight over the scale of its group, half of the distance of two values, and the
# largest code, which multiplies the rounding of the scale.
STEPS = {"int8": (0.5, 127), "q8_0": (0.5, 127), "int4": (0.5, 15), "fp8": (16.0, 448)}


@pytest.mark.parametrize("variant", [name for name in VARIANTS if VARIANTS[name][0] in STEPS])
def test_a_quantised_weight_is_near(variant):
    name, options = VARIANTS[variant]
    weight = seeded(40, 200, dtype=torch.float32)
    weight[3] = 0
    weight[:, 5] *= 10
    codes, scales = find(name).quantise(weight, **options)
    got = dequantise(codes, scales, name, 40, 200)
    scale = unpack_groups(scales[0], 40).float()
    group = find(name).group(scales, 200)
    step = scale.repeat_interleave(group, 1)[:, :200]
    distance, largest = STEPS[name]
    bound = distance + largest * torch.finfo(scales[0].dtype).eps
    assert bool(((got - weight).abs() <= bound * step).all())
    assert not bool(got[3].any())


def test_nf4_takes_the_nearest_value():
    weight = seeded(20, 200, dtype=torch.float32)
    codes, scales = find("nf4").quantise(weight, double=False)
    absmax = unpack_groups(scales[0], 20).repeat_interleave(64, 1)[:, :200]
    best = (weight[..., None] / absmax[..., None] - torch.tensor(nf4.VALUES)).abs().amin(-1)
    error = (dequantise(codes, scales, "nf4", 20, 200) - weight).abs()
    assert torch.allclose(error, best * absmax, atol=1e-6)


def test_the_map_of_double_quantisation():
    """256 ascending values: of each sign 1, 2, 4 ... 64 for the powers of ten below 1; 0 and 1."""
    table = dynamic_map(signed=True)
    assert table.shape == (256,)
    assert bool((table.diff() > 0).all())
    assert float(table[127]) == 0
    assert float(table[255]) == 1
    assert torch.equal(table[:127], -table[128:255].flip(0))
    decades = [int(((table > 0.1 * top) & (table < top)).sum()) for top in 10.0 ** torch.arange(-6.0, 1)]
    assert decades == [1, 2, 4, 8, 16, 32, 64]


def test_q8_0_and_q4_k_have_the_values_of_gguf():
    gguf = pytest.importorskip("gguf")
    from gguf.quants import dequantize, quantize

    weight = seeded(24, 96, dtype=torch.float32)
    weight[0, :32] = 0
    blocks = quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    codes, scales = find("q8_0").quantise(weight)
    theirs = dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(dequantise(codes, scales, "q8_0", 24, 96).numpy(), theirs)
    # Q4_K: a block of 256 is d, dmin, 12 bytes of 6-bit scales and minima, 128 bytes of codes.
    blocks = integers(0, 256, 6, 144).to(torch.uint8).numpy()
    blocks[:, 0:4].view(np.float16)[:] = seeded(6, 2, dtype=torch.float16, scale=0.01).numpy()
    theirs = dequantize(blocks, gguf.GGMLQuantizationType.Q4_K).reshape(6, 256)
    d, dmin = blocks[:, 0:4].copy().view(np.float16).T
    six = blocks[:, 4:16].astype(np.int64)
    sc, m = np.zeros((6, 8), np.uint8), np.zeros((6, 8), np.uint8)
    for j in range(4):
        sc[:, j], m[:, j] = six[:, j] & 63, six[:, j + 4] & 63
        sc[:, j + 4] = six[:, j + 8] & 15 | six[:, j] >> 6 << 4
        m[:, j + 4] = six[:, j + 8] >> 4 | six[:, j + 4] >> 6 << 4
    halves = blocks[:, 16:].reshape(6, 4, 32)
    numbers = np.stack([halves & 15, halves >> 4], 2).reshape(6, 256)
    parts = [torch.from_numpy(np.ascontiguousarray(part)) for part in (d[:, None], dmin[:, None], sc, m)]
    ours = dequantise(pack_codes(torch.from_numpy(numbers), 4), [pack_groups(part) for part in parts], "q4_k", 6, 256)
    assert np.array_equal(ours.numpy(), theirs)


def test_a_group_of_int4_is_found_from_its_scales():
    for group, inputs in itertools.product((32, 64, 128), (1, 32, 33, 100, 128, 576)):
        _, scales = find("int4").quantise(seeded(3, inputs, dtype=torch.float32), group=group)
        found = find("int4").group(scales, inputs)
        assert -(-inputs // found) == -(-inputs // group)


def test_bad_input_is_one_sentence():
    weight = torch.ones(3, 40)
    with pytest.raises(ToolkitError, match=r"format must be one of .* got 'nf5'; did you mean 'nf4'"):
        find("nf5")
    with pytest.raises(ToolkitError, match="q4_k is read from files only; quantise to one of fp8, int4, int8"):
        find("q4_k").quantise(weight)
    with pytest.raises(ToolkitError, match=r"\[N, K\], got shape \[3\]"):
        find("int8").quantise(weight[:, 0])
    with pytest.raises(ToolkitError, match="must be finite to be quantised to int8"):
        find("int8").quantise(weight / 0)
    with pytest.raises(ToolkitError, match="group must be one of 32, 64, 128, got 16"):
        find("int4").quantise(weight, group=16)
    with pytest.raises(ToolkitError, match=r"scale_dtype must be float16, bfloat16 or float32, got torch.float64"):
        int4.quantise(weight, scale_dtype=torch.float64)
    codes, scales = find("int4").quantise(weight)
    with pytest.raises(ToolkitError, match=r"int4: codes must be torch.int32 of shape \[2, 5, 16\] .* got"):
        find("int4").check(codes, scales, 17, 40)
    with pytest.raises(ToolkitError, match="int4: scales must be 2 tensors, got 1"):
        find("int4").check(codes, scales[:1], 3, 40)
    with pytest.raises(ToolkitError, match=r"int4: scale must be torch.float16 or .* got torch.float64"):
        find("int4").check(codes, [scales[0].double(), scales[1]], 3, 40)
    with pytest.raises(ToolkitError, match="q8_0: the scales must have 2 groups for K = 40, got 1"):
        find("q8_0").check(find("int8").quantise(weight)[0], [scales[0]], 3, 40)


def test_all_formats_are_listed():
    assert list(FORMATS) == sorted({name for name, _ in VARIANTS.values()})
    assert makers() == ["fp8", "int4", "int8", "nf4", "q8_0"]


@pytest.mark.parametrize("format", [*makers(), "nf4 single"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_by_their_own_codes(format: str, dtype: torch.dtype) -> None:
    """Of a weight whose last panel and last block of nested scales are not full; more rows than are done at once."""
    name, _, single = format.partition(" ")
    weight = torch.randn(83, 200, generator=torch.Generator().manual_seed(0))
    codes, scales = find(name).quantise(weight, **({"double": False} if single else {}))
    rows = torch.randint(83, (300,), generator=torch.Generator().manual_seed(1))
    for some in (rows, rows[:1], rows[:0]):
        dense = dequantise(codes, scales, name, 83, 200, dtype)
        assert torch.equal(dequantise_rows(some, codes, scales, name, 200, dtype), dense[some])
    with pytest.raises(IndexError):
        dequantise_rows(torch.tensor([96]), codes, scales, name, 200, dtype)
