import math

import pytest
import torch
from torch import Tensor

from tests.helpers.implementations import NATIVE, TRITON, impl_and_dtype, implementations, only_triton
from tests.helpers.interpreter import far_apart
from tests.helpers.rowwise import check_oracle, check_repeatable, check_rows, error, integers, seeded
from toolkit.errors import ToolkitError
from toolkit.ops.rotary import rotary, rotary_tables


def frequencies(n: int, theta: float = 10_000.0) -> Tensor:
    return 1.0 / theta ** (torch.arange(n, dtype=torch.float32) / n)


def by_complex_numbers(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """The rotation by ``angles`` [T, R/2] as a product of complex numbers."""
    half = angles.shape[-1]
    pairs = x[..., : 2 * half]
    a, b = (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else (pairs[..., :half], pairs[..., half:])
    z = torch.complex(a.contiguous(), b.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    turned = torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    return torch.cat((turned, x[..., 2 * half :]), -1)


@impl_and_dtype()
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "width", "rotated"),
    [
        (1, 1, 2, 2),
        (5, 3, 64, 64),
        (7, 2, 60, 30),
        (3, 1, 13, 6),
        (0, 2, 8, 8),
        (4, 2, 8, 0),
        (33, 4, 128, 128),
        (3, 0, 8, 8),
        (2, 40, 128, 128),
        (65, 1, 32, 32),
    ],
)
def test_values_and_gradients(impl, interleaved, dtype, tokens, heads, width, rotated):
    angles = seeded(tokens, rotated // 2, scale=3.0)
    cos, sin = (torch.cat((t, t), -1).to(dtype) for t in (angles.cos(), angles.sin()))
    # The oracle gets the angle and length that the rounded tables stand for.
    half = rotated // 2
    c, s = cos[:, :half].double(), sin[:, :half].double()
    exact, length = torch.atan2(s, c), torch.hypot(s, c)

    def oracle(x: Tensor) -> Tensor:
        scale = torch.cat((length, length, torch.ones(tokens, width - rotated, dtype=torch.float64)), -1)
        if interleaved:
            scale = torch.cat((length.repeat_interleave(2, -1), scale[:, rotated:]), -1)
        return by_complex_numbers(x, exact, interleaved) * scale[:, None]

    x = seeded(tokens, heads, width, dtype=dtype)
    check_oracle(lambda x: rotary(x, cos, sin, interleaved, impl=impl.option), oracle, [x], None, dtype)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_of_general_tables_is_the_transposed_map(impl, interleaved):
    dtype = impl.dtypes[0]
    cos, sin = seeded(4, 6, dtype=dtype, seed=1), seeded(4, 6, dtype=dtype, seed=2)
    x, y = seeded(4, 2, 9, dtype=dtype).requires_grad_(), seeded(4, 2, 9, dtype=dtype, seed=3)
    out = rotary(x, cos, sin, interleaved, impl=impl.option)
    (pulled,) = torch.autograd.grad(out, x, y)
    near = {"rtol": 1e-5, "atol": 1e-8 if dtype == torch.float64 else 1e-5}
    assert torch.allclose((out * y).sum(), (x * pulled).sum(), **near)
    basis = torch.eye(9, dtype=dtype)
    for t in range(4):
        columns = rotary(basis.expand(1, 9, 9), cos[t : t + 1], sin[t : t + 1], interleaved, impl=impl.option)[0]
        assert torch.allclose(pulled[t], y[t] @ columns.T, **near)


def test_float32_bits_are_those_of_the_usual_eager_form(impl):
    cos, sin = rotary_tables(torch.arange(50), frequencies(30))
    x = seeded(50, 3, 60, dtype=torch.float32)
    turned = torch.cat((-x[..., 30:], x[..., :30]), -1)
    assert torch.equal(rotary(x, cos, sin, impl=impl.option), x * cos[:, None] + turned * sin[:, None])
    swapped = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    c, s = (t[:, :30].repeat_interleave(2, -1)[:, None] for t in (cos, sin))
    assert torch.equal(rotary(x, cos, sin, True, impl=impl.option), x * c + swapped * s)


@pytest.mark.parametrize("interleaved", [False, True])
def test_strided_inputs(impl, interleaved):
    cos, sin = rotary_tables(torch.arange(6), frequencies(4))
    base = seeded(6, 3 * 5 * 8, dtype=torch.float32)
    rows = base.view(6, 15, 8)
    views = [
        rows[:, 2:7],
        rows[:, ::2],
        rows.flip(1).transpose(0, 1)[:6].transpose(0, 1),
        base.view(6, 8, 15).mT,
    ]
    offset = seeded(6, 4 * 8 + 5, dtype=torch.float32)[:, 3:35].view(6, 4, 8)
    for x in (*views, offset, rows[:, :1].expand(6, 4, 8)):
        out = rotary(x, cos, sin, interleaved, impl=impl.option)
        assert out.is_contiguous()
        assert torch.equal(out, rotary(x.contiguous(), cos, sin, interleaved, impl="reference"))
    joined = torch.cat((cos, cos), -1)[:, :8]
    assert torch.equal(rotary(rows, joined, sin, interleaved, impl=impl.option), rotary(rows, cos, sin, interleaved))
    assert torch.equal(rotary(rows, cos, sin.double(), interleaved), rotary(rows, cos, sin, interleaved))
    c, s = cos.half(), sin.half()
    assert torch.equal(rotary(rows, c, s, interleaved), rotary(rows, c.float(), s.float(), interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rows_do_not_depend_on_other_rows(impl, interleaved):
    rows, heads = (23, 3) if impl is TRITON else (60, 20)
    cos, sin = rotary_tables(torch.arange(rows), frequencies(15))
    inputs = [seeded(rows, heads, 37, dtype=torch.float32), cos, sin]
    check_rows(lambda x, c, s: rotary(x, c, s, interleaved, impl=impl.option), inputs)
    check_repeatable(lambda x: rotary(x, cos, sin, interleaved, impl=impl.option), inputs[:1])


@pytest.mark.parametrize("n", [1, 5, 32, 64, 130])
def test_tables(impl, n):
    positions, inv_freq = torch.tensor([[0, 1, 2, 17], [1023, 4097, 131071, 999_999]]), frequencies(n)
    angles = (positions.float()[..., None] * inv_freq).double()
    for dtype, tolerance in ((torch.float32, 1.2e-7), (torch.bfloat16, 4e-3), (torch.float16, 2**-11)):
        if dtype not in impl.dtypes:
            continue
        tables = rotary_tables(positions, inv_freq, 1.3, dtype, impl=impl.option)
        for got, wanted in zip(tables, (angles.cos(), angles.sin())):
            assert got.dtype == dtype
            assert got.shape == (2, 4, 2 * n)
            assert error(got, 1.3 * torch.cat((wanted, wanted), -1)) <= tolerance
    exact = positions.double()[..., None] * inv_freq.double()
    cos, sin = rotary_tables(positions, inv_freq, 1.0, torch.float64, impl=impl.option)
    assert error(cos[..., :n], exact.cos()) < 1e-15
    assert error(sin[..., n:], exact.sin()) < 1e-15


def test_tables_of_several_axes(impl):
    positions = integers(0, 5000, 3, 2, 7)
    inv_freq, axes = frequencies(7), torch.tensor([0, 0, 2, 1, 1, 2, 0])
    dtypes = {torch.float32, torch.float64, torch.bfloat16} & {*impl.dtypes, torch.float64}
    for dtype in dtypes:
        got = rotary_tables(positions, inv_freq, 1.3, dtype, axes, impl=impl.option)
        for f, axis in enumerate(axes):
            alone = rotary_tables(positions[axis], inv_freq, 1.3, dtype, impl=impl.option)
            for one, wanted in zip(got, alone):
                assert one.shape == (2, 7, 14)
                assert torch.equal(one[..., [f, f + 7]], wanted[..., [f, f + 7]])
    by_row = positions.flatten(1).T
    check_rows(lambda p: rotary_tables(p.T, inv_freq, 1.0, torch.float32, axes, impl=impl.option), [by_row])
    strided = positions.transpose(0, 2).contiguous().transpose(0, 2)
    got = rotary_tables(positions, inv_freq, 1.3, impl.dtypes[-1], axes, impl=impl.option)
    again = rotary_tables(strided, inv_freq, 1.3, impl.dtypes[-1], axes.repeat_interleave(2)[::2], impl=impl.option)
    assert all(map(torch.equal, again, got))


def vision_config(sections: list[int]) -> dict:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections}
    return {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
            "rope_parameters": rope}  # fmt: skip


def interleaved_sections(sections: list[int]) -> Tensor:
    return torch.tensor([f % 3 if f < 3 * sections[f % 3] else 0 for f in range(sum(sections))])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_sections_are_those_of_transformers(impl, name):
    sections = [6, 5, 5]
    if name == "qwen2_vl":
        from transformers import Qwen2VLTextConfig as Config
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding as Rotary
    elif name == "qwen2_5_vl":
        from transformers import Qwen2_5_VLTextConfig as Config
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding as Rotary
    else:
        from transformers import Qwen3VLTextConfig as Config
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding as Rotary
    module = Rotary(Config(**vision_config(sections)))
    positions = integers(0, 3000, 3, 2, 9)
    wanted = module(torch.zeros(1), positions)
    chunked = torch.arange(3).repeat_interleave(torch.tensor(sections))
    axes = interleaved_sections(sections) if name == "qwen3_vl" else chunked
    got = rotary_tables(positions, module.inv_freq, 1.0, torch.float32, axes, impl=impl.option)
    if wanted[0].dim() == 4:  # a table an axis, the sections taken later
        which = torch.cat((axes, axes))
        wanted = [table.movedim(0, -1).gather(-1, which[:, None].expand(2, 9, -1, 1))[..., 0] for table in wanted]
    assert max(map(error, got, wanted)) < 1.2e-7


def test_table_rows_do_not_depend_on_other_rows(impl):
    positions = torch.randperm(
        3000 if impl is not TRITON else 300, generator=torch.Generator().manual_seed(0), device="cpu"
    ).to(impl.device)
    for n in (3, 32):
        check_rows(lambda p, n=n: rotary_tables(p, frequencies(n), 1.0, impl=impl.option), [positions])
    assert [t.shape for t in rotary_tables(positions[:0], frequencies(4), impl=impl.option)] == [(0, 8)] * 2


def test_extreme_values(impl):
    cos, sin = rotary_tables(torch.arange(2), frequencies(2))
    x = torch.tensor([[[1e38, 1.0, -1e38, math.inf]], [[math.nan, 1.0, 2.0, 3.0]]])
    out = rotary(x, cos, sin, impl=impl.option)
    assert out[0, 0, :3].tolist()[0::2] == x[0, 0, :3].tolist()[0::2]
    assert out[1, 0].isnan().tolist() == [True, False, True, False]


def test_bad_input_is_named(impl):
    x, table = torch.ones(2, 1, 4), torch.ones(2, 4)
    for bad in (torch.ones(3, 4), torch.ones(2, 6), torch.ones(2, 3)):
        with pytest.raises(ToolkitError, match="cos and sin must have shape"):
            rotary(x, bad, bad, impl=impl.option)
    with pytest.raises(ToolkitError, match=r"got \[2, 4\] and \[2, 2\]"):
        rotary(x, table, table[:, :2], impl=impl.option)
    positions, axes = torch.zeros(3, 5, dtype=torch.int64), torch.tensor([0, 1, 2, 2])
    for bad in (axes[:3], axes.int()):
        with pytest.raises(ToolkitError, match=r"axes must be int64 \[4\] .* got"):
            rotary_tables(positions, frequencies(4), axes=bad, impl=impl.option)
    for bad in (axes + 1, axes - 3):
        if impl is TRITON:  # an axis that is not there makes NaN
            assert rotary_tables(positions, frequencies(4), axes=bad)[0].isnan().any()
            continue
        with pytest.raises((RuntimeError, IndexError)):
            rotary_tables(positions, frequencies(4), axes=bad, impl=impl.option)


@implementations(NATIVE, TRITON)
@pytest.mark.parametrize("interleaved", [False, True])
def test_offsets_past_two_to_the_31(impl, interleaved):
    x = seeded(3, 2, 16, dtype=torch.float16)
    cos, sin = (seeded(3, 16, dtype=torch.float32, seed=seed) for seed in (1, 2))
    assert torch.equal(rotary(far_apart(x), cos, sin, interleaved), rotary(x, cos, sin, interleaved))


@only_triton
def test_tables_are_those_of_the_reference_but_for_the_last_bit(impl):
    positions = integers(0, 1 << 24, 400)
    angles = (positions.float()[:, None] * frequencies(16)).double()
    cos, sin = rotary_tables(positions, frequencies(16))
    assert torch.equal(cos[:, :16], angles.cos().float())
    assert torch.equal(sin[:, :16], angles.sin().float())


@only_triton
def test_an_axis_that_is_not_there_makes_nan_of_its_frequency_alone(impl):
    positions, axes = integers(0, 5000, 3, 2, 7), torch.tensor([0, 0, 2, 1, 1, 2, 0])
    for bad in (-1, 3):
        axes[4] = bad
        cos, _ = rotary_tables(positions, frequencies(7), 1.0, torch.float32, axes)
        assert cos.isnan().any((0, 1)).nonzero().flatten().tolist() == [4, 11]
    empty = rotary_tables(positions[:, :, :0], frequencies(7), 1.0, torch.float32, axes)
    assert [t.shape for t in empty] == [(2, 0, 14)] * 2


@only_triton
def test_limits_of_the_triton_kernels_are_named(impl):
    with pytest.raises(ToolkitError, match=r"kernels of rotary, got torch\.float64"):
        rotary(torch.ones(1, 1, 2).double(), torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ToolkitError, match=r"positions int64, got .* torch.int32"):
        rotary_tables(torch.arange(3, dtype=torch.int32), frequencies(2))


def test_opcheck():
    cos, sin = rotary_tables(torch.arange(3), frequencies(2))
    x = seeded(3, 2, 6, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.toolkit.rotary.default, (x, cos, sin, False))
    torch.library.opcheck(torch.ops.toolkit.rotary.default, (x, cos, sin, True))
    arguments = (torch.arange(3), frequencies(2), 1.0, torch.bfloat16)
    torch.library.opcheck(torch.ops.toolkit.rotary_tables.default, arguments)
    arguments = (torch.zeros(2, 3, dtype=torch.int64), frequencies(2), 1.0, torch.float32, torch.tensor([1, 0]))
    torch.library.opcheck(torch.ops.toolkit.rotary_tables.default, arguments)
