import math

import pytest
import torch
from torch import Tensor

from tests.helpers.rowwise import DTYPES, IMPLS, check_oracle, check_repeatable, check_rows, error, seeded
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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
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
    check_oracle(lambda x: rotary(x, cos, sin, interleaved, impl=impl), oracle, [x])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_of_general_tables_is_the_transposed_map(impl, interleaved):
    cos, sin = seeded(4, 6, seed=1), seeded(4, 6, seed=2)
    x, y = seeded(4, 2, 9).requires_grad_(), seeded(4, 2, 9, seed=3)
    out = rotary(x, cos, sin, interleaved, impl=impl)
    (pulled,) = torch.autograd.grad(out, x, y)
    assert torch.allclose((out * y).sum(), (x * pulled).sum())
    basis = torch.eye(9, dtype=torch.float64)
    for t in range(4):
        columns = rotary(basis.expand(1, 9, 9), cos[t : t + 1], sin[t : t + 1], interleaved, impl=impl)[0]
        assert torch.allclose(pulled[t], y[t] @ columns.T)


@pytest.mark.parametrize("impl", IMPLS)
def test_float32_bits_are_those_of_the_usual_eager_form(impl):
    cos, sin = rotary_tables(torch.arange(50), frequencies(30))
    x = seeded(50, 3, 60, dtype=torch.float32)
    turned = torch.cat((-x[..., 30:], x[..., :30]), -1)
    assert torch.equal(rotary(x, cos, sin, impl=impl), x * cos[:, None] + turned * sin[:, None])
    swapped = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    c, s = (t[:, :30].repeat_interleave(2, -1)[:, None] for t in (cos, sin))
    assert torch.equal(rotary(x, cos, sin, True, impl=impl), x * c + swapped * s)


@pytest.mark.parametrize("impl", IMPLS)
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
    for x in (*views, rows[:, :1].expand(6, 4, 8)):
        out = rotary(x, cos, sin, interleaved, impl=impl)
        assert out.is_contiguous()
        assert torch.equal(out, rotary(x.contiguous(), cos, sin, interleaved, impl="reference"))
    wide = torch.cat((cos, cos), -1)[:, :8]
    assert torch.equal(rotary(rows, wide, sin, interleaved, impl=impl), rotary(rows, cos, sin, interleaved))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rows_do_not_depend_on_other_rows(impl, interleaved):
    cos, sin = rotary_tables(torch.arange(60), frequencies(15))
    inputs = [seeded(60, 20, 37, dtype=torch.float32), cos, sin]
    check_rows(lambda x, c, s: rotary(x, c, s, interleaved, impl=impl), inputs)
    check_repeatable(lambda x: rotary(x, cos, sin, interleaved, impl=impl), inputs[:1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", [1, 5, 32, 64])
def test_tables(impl, n):
    positions, inv_freq = torch.tensor([[0, 1, 2, 17], [1023, 4097, 131071, 999_999]]), frequencies(n)
    angles = (positions.float()[..., None] * inv_freq).double()
    for dtype, tolerance in ((torch.float32, 1.2e-7), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
        tables = rotary_tables(positions, inv_freq, 1.3, dtype, impl=impl)
        for got, wanted in zip(tables, (angles.cos(), angles.sin())):
            assert got.dtype == dtype
            assert got.shape == (2, 4, 2 * n)
            assert error(got, 1.3 * torch.cat((wanted, wanted), -1)) <= tolerance
    exact = positions.double()[..., None] * inv_freq.double()
    cos, sin = rotary_tables(positions, inv_freq, 1.0, torch.float64, impl=impl)
    assert error(cos[..., :n], exact.cos()) < 1e-15
    assert error(sin[..., n:], exact.sin()) < 1e-15


@pytest.mark.parametrize("impl", IMPLS)
def test_tables_of_several_axes(impl):
    positions = torch.randint(5000, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    inv_freq, axes = frequencies(7), torch.tensor([0, 0, 2, 1, 1, 2, 0])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        got = rotary_tables(positions, inv_freq, 1.3, dtype, axes, impl=impl)
        for f, axis in enumerate(axes):
            alone = rotary_tables(positions[axis], inv_freq, 1.3, dtype, impl=impl)
            for one, wanted in zip(got, alone):
                assert one.shape == (2, 7, 14)
                assert torch.equal(one[..., [f, f + 7]], wanted[..., [f, f + 7]])
    by_row = positions.flatten(1).T
    check_rows(lambda p: rotary_tables(p.T, inv_freq, 1.0, torch.float32, axes, impl=impl), [by_row])
    strided = positions.transpose(0, 2).contiguous().transpose(0, 2)
    again = rotary_tables(strided, inv_freq, 1.3, torch.bfloat16, axes.repeat_interleave(2)[::2], impl=impl)
    assert all(map(torch.equal, again, got))


def vision_config(sections: list[int]) -> dict:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections}
    return {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
            "rope_parameters": rope}  # fmt: skip


def interleaved_sections(sections: list[int]) -> Tensor:
    return torch.tensor([f % 3 if f < 3 * sections[f % 3] else 0 for f in range(sum(sections))])


@pytest.mark.parametrize("impl", IMPLS)
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
    positions = torch.randint(3000, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    wanted = module(torch.zeros(1), positions)
    chunked = torch.arange(3).repeat_interleave(torch.tensor(sections))
    axes = interleaved_sections(sections) if name == "qwen3_vl" else chunked
    got = rotary_tables(positions, module.inv_freq, 1.0, torch.float32, axes, impl=impl)
    if wanted[0].dim() == 4:  # a table an axis, the sections taken later
        which = torch.cat((axes, axes))
        wanted = [table.movedim(0, -1).gather(-1, which[:, None].expand(2, 9, -1, 1))[..., 0] for table in wanted]
    assert max(map(error, got, wanted)) < 1.2e-7


@pytest.mark.parametrize("impl", IMPLS)
def test_table_rows_do_not_depend_on_other_rows(impl):
    positions = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    for n in (3, 32):
        check_rows(lambda p, n=n: rotary_tables(p, frequencies(n), 1.0, impl=impl), [positions])
    assert [t.shape for t in rotary_tables(positions[:0], frequencies(4), impl=impl)] == [(0, 8)] * 2


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_values(impl):
    cos, sin = rotary_tables(torch.arange(2), frequencies(2))
    x = torch.tensor([[[1e38, 1.0, -1e38, math.inf]], [[math.nan, 1.0, 2.0, 3.0]]])
    out = rotary(x, cos, sin, impl=impl)
    assert out[0, 0, :3].tolist()[0::2] == x[0, 0, :3].tolist()[0::2]
    assert out[1, 0].isnan().tolist() == [True, False, True, False]


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_input_is_named(impl):
    x, table = torch.ones(2, 1, 4), torch.ones(2, 4)
    for bad in (torch.ones(3, 4), torch.ones(2, 6), torch.ones(2, 3)):
        with pytest.raises(ToolkitError, match="cos has shape"):
            rotary(x, bad, bad, impl=impl)
    with pytest.raises(ToolkitError, match=r"sin \[2, 2\]"):
        rotary(x, table, table[:, :2], impl=impl)
    positions, axes = torch.zeros(3, 5, dtype=torch.int64), torch.tensor([0, 1, 2, 2])
    for bad in (axes[:3], axes.int()):
        with pytest.raises(ToolkitError, match=r"axes have shape .* need int64 \[4\]"):
            rotary_tables(positions, frequencies(4), axes=bad, impl=impl)
    for bad in (axes + 1, axes - 3):
        with pytest.raises((RuntimeError, IndexError)):
            rotary_tables(positions, frequencies(4), axes=bad, impl=impl)


def test_opcheck():
    cos, sin = rotary_tables(torch.arange(3), frequencies(2))
    x = seeded(3, 2, 6, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.toolkit.rotary.default, (x, cos, sin, False))
    torch.library.opcheck(torch.ops.toolkit.rotary.default, (x, cos, sin, True))
    arguments = (torch.arange(3), frequencies(2), 1.0, torch.bfloat16)
    torch.library.opcheck(torch.ops.toolkit.rotary_tables.default, arguments)
    arguments = (torch.zeros(2, 3, dtype=torch.int64), frequencies(2), 1.0, torch.float32, torch.tensor([1, 0]))
    torch.library.opcheck(torch.ops.toolkit.rotary_tables.default, arguments)
