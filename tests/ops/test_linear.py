"""linear: against fp64, its gradients, and that a row's bits depend on that row alone."""

import json
import random
from dataclasses import asdict
from importlib.metadata import version

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.helpers.implementations import (
    NATIVE,
    REFERENCE,
    SMALL,
    TRITON,
    impl_and,
    impl_and_dtype,
    impl_dtype_and,
    implementations,
    only_interpreter,
    only_triton,
)
from tests.helpers.interpreter import far_apart
from tests.helpers.rowwise import seeded
from toolkit.errors import ToolkitError
from toolkit.ops.linear import linear, linear_group, tiles
from toolkit.ops.registry import has_native
from toolkit.ops.tiles import DECODE_ROWS, GemmTile

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROWS = [0, 1, 2, 3, 5, 6, 7, 13, 64, 100]
INNER = [1, 7, 60, 513]
OUTPUTS = [1, 15, 17, 100]
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


pytestmark = pytest.mark.usefixtures("one_thread")


def make(rows, inner, outputs, dtype=torch.float32, bias=True, seed=0):
    shapes = (rows, inner), (outputs, inner), (outputs,)
    x, w, b = (seeded(*shape, dtype=dtype, seed=seed + at) for at, shape in enumerate(shapes))
    return x, w, b if bias else None


def oracle(x, w, b):
    y = x.double() @ w.double().T
    return y if b is None else y + b.double()


def assert_sums_close(y, x, w, b):
    """Error within a few ulp of the sum of magnitudes, the scale that rounding of a sum of products goes by."""
    terms = x.double().abs() @ w.double().abs().T + (0 if b is None else b.double().abs())
    adding = EPS[torch.float64 if x.dtype == torch.float64 else torch.float32]
    units = 32 if x.is_cuda else 1  # matrix units truncate what they add
    bound = 30 * units * adding * terms + EPS[x.dtype] * oracle(x, w, b).abs() + torch.finfo(x.dtype).tiny
    error = (y.double() - oracle(x, w, b)).abs()
    assert bool((error <= bound).all()), f"largest error {error.max():.3g} against {bound.max():.3g}"


@impl_and_dtype()
@pytest.mark.parametrize("inner", INNER)
def test_forward_matches_double(impl, dtype, inner):
    few = SMALL and impl is TRITON
    inner = min(inner, 130) if few else inner  # several steps of a tile
    for outputs in OUTPUTS:
        for rows in ROWS[:: 3 if few else 1]:
            for bias in (False, True):
                x, w, b = make(rows, inner, outputs, dtype, bias, seed=rows)
                y = linear(x, w, b, impl=impl.option)
                assert y.shape == (rows, outputs)
                assert y.dtype == dtype
                assert_sums_close(y, x, w, b)


@implementations(REFERENCE, NATIVE)
@pytest.mark.parametrize(("inner", "outputs", "rows"), [(1408, 512, 4), (1030, 33, 19), (512, 600, 401), (4096, 8, 2)])
def test_forward_of_larger_blocks_matches_double(impl, inner, outputs, rows):
    for dtype in (torch.float32, torch.float64):
        x, w, b = make(rows, inner, outputs, dtype)
        assert_sums_close(linear(x, w, b, impl=impl.option), x, w, b)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_gradients_match_double(impl, inner, outputs):
    """In the most precise dtype of the implementation."""
    near = impl.near(1e-10, 1e-4)
    few = SMALL and impl is TRITON
    inner = min(inner, 130) if few else inner  # several steps of a tile
    for rows in ROWS[:: 3 if few else 1]:
        x, w, b = (t.requires_grad_() for t in make(rows, inner, outputs, impl.dtypes[0], seed=rows))
        grad = seeded(rows, outputs, dtype=x.dtype, seed=9)
        linear(x, w, b, impl=impl.option).backward(grad)
        exact = grad.double()
        torch.testing.assert_close(x.grad.double(), exact @ w.detach().double(), rtol=near, atol=near)
        torch.testing.assert_close(w.grad.double(), exact.T @ x.detach().double(), rtol=near, atol=near)
        torch.testing.assert_close(b.grad.double(), exact.sum(0), rtol=near, atol=near)


@impl_and_dtype([torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_narrow_types(impl, dtype):
    x, w, b = (t.requires_grad_() for t in make(13, 60, 17, dtype))
    upcast = [t.detach().double().requires_grad_() for t in (x, w, b)]
    grad = seeded(13, 17, dtype=dtype, seed=9)
    linear(x, w, b, impl=impl.option).backward(grad)
    torch.nn.functional.linear(*upcast).backward(grad.double())
    for ours, exact in zip((x, w, b), upcast):
        assert ours.grad.dtype == dtype
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=4 * EPS[dtype], atol=40 * EPS[dtype])


def test_only_the_gradients_asked_for(impl):
    for wanted in range(1, 8):
        tensors = make(5, 7, 3)
        for i, t in enumerate(tensors):
            t.requires_grad_(bool(wanted >> i & 1))
        linear(*tensors, impl=impl.option).sum().backward()
        assert [t.grad is not None for t in tensors] == [bool(wanted >> i & 1) for i in range(3)]


def test_gradients_under_checkpointing_are_the_same(impl):
    grads = []
    for use in (False, True):
        x, w, b = (t.requires_grad_() for t in make(7, 60, 17))
        y = (
            checkpoint(linear, x, w, b, impl=impl.option, use_reentrant=False)
            if use
            else linear(x, w, b, impl=impl.option)
        )
        y.square().sum().backward()
        grads.append((x.grad, w.grad, b.grad))
    assert all(torch.equal(*pair) for pair in zip(*grads))


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_are_the_same_from_run_to_run(threads):
    torch.set_num_threads(threads)

    def gradients():
        x, w, b = (t.requires_grad_() for t in make(100, 513, 100))
        linear(x, w, b).square().sum().backward()
        return x.grad, w.grad, b.grad

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(*pair) for pair in zip(first, gradients()))


@impl_dtype_and(
    "inner, outputs, threads",
    [(*size, threads) for size in [(513, 100), (60, 17), (1100, 48), (512, 64)] for threads in (1, 2)],
    [(513, 100, 1), (60, 17, 1)],
    [torch.float32, torch.float64, torch.bfloat16],
)
def test_bits_of_a_row_do_not_depend_on_other_rows(impl, dtype, inner, outputs, threads):
    """Any rows, in any order, in any chunks, with other rows beside them, give the bits of the full product."""
    torch.set_num_threads(threads)
    rng = random.Random(inner)
    few = SMALL and impl is TRITON
    rows = 75 if few else 430 if impl is NATIVE else 160  # more than two blocks of rows
    inner = min(inner, 130) if few else inner
    x, w, b = make(rows, inner, outputs, dtype)
    full = linear(x, w, b, impl=impl.option)
    for trial in range(5 if few else 12):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(trial))
        start = 0
        while start < rows:
            size = rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 23, 64, 193, rows])
            chosen = order[start : start + size]
            start += size if trial < 4 else 10 * size
            assert torch.equal(linear(x[chosen], w, b, impl=impl.option), full[chosen]), (trial, start, size)


@impl_and("threads", [1, 2], [1])
def test_bits_of_every_small_number_of_rows(impl, threads):
    torch.set_num_threads(threads)
    x, w, _ = make(40, 70 if SMALL and impl is TRITON else 520, 40)
    full = linear(x, w, impl=impl.option)
    for rows in range(1, 40):
        assert torch.equal(linear(x[:rows], w, impl=impl.option), full[:rows]), rows
        assert torch.equal(linear(x[40 - rows :], w, impl=impl.option), full[40 - rows :]), rows


def test_threads_do_not_change_bits():
    x, w, b = make(300, 513, 100)
    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        results.append(linear(x, w, b))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.skipif(not has_native("linear"), reason="neighbouring outputs are a promise of the native kernel only")
def test_an_output_does_not_depend_on_the_other_outputs():
    x, w, _ = make(9, 513, 100)
    full = linear(x, w)
    for outputs in (1, 15, 16, 17, 99):
        assert torch.equal(linear(x, w[:outputs]), full[:, :outputs])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [2, 5, 7, 13, 200])
def test_nan_and_infinity_stay_in_their_row(impl, poison, rows):
    x, w, b = make(rows, 60, 17)
    clean = linear(x, w, b, impl=impl.option)
    for bad in {0, rows // 2, rows - 1}:
        dirty = x.clone()
        dirty[bad, 13] = poison
        y = linear(dirty, w, b, impl=impl.option)
        others = [i for i in range(rows) if i != bad]
        assert torch.equal(y[others], clean[others])
        assert not bool(y[bad].isfinite().any())


def test_extreme_values(impl):
    x = torch.tensor([[1e38, -1e38, 0.0], [3e38, 3e38, 0.0], [-0.0, 0.0, 0.0], [0.0, 0.0, 1e-38]])
    w = torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.25, 1.0]])
    y = linear(x, w, impl=impl.option)
    assert torch.equal(y, torch.tensor([[0.0, 2.5e37], [float("inf"), 2.25e38], [0.0, 0.0], [1e-38, 1e-38]]))


def test_leading_dimensions(impl):
    x, w, b = make(24, 60, 17)
    flat = linear(x, w, b, impl=impl.option)
    assert torch.equal(linear(x.view(2, 3, 4, 60), w, b, impl=impl.option), flat.view(2, 3, 4, 17))
    assert torch.equal(linear(x[5], w, b, impl=impl.option), flat[5])
    assert linear(x.view(2, 12, 60)[:, :0], w, b, impl=impl.option).shape == (2, 0, 17)


@impl_and_dtype([torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_strides_do_not_change_bits(impl, dtype):
    x, w, b = make(26, 120, 34, dtype)
    for view_x, view_w in [
        (x[::2, :60], w[::2, :60]),
        (x[:, ::2], w[:, ::2]),
        (x[:, :34].T.contiguous().T, w[:, :34].T.contiguous().T),
        (x[:, 1:61], w[:, 60:]),
        (x[:1, :60].expand(9, 60), w[:1, :60].expand(5, 60)),
    ]:
        shift = b[: view_w.shape[0]]
        expected = linear(view_x.contiguous(), view_w.contiguous(), shift, impl=impl.option)
        assert torch.equal(linear(view_x, view_w, shift, impl=impl.option), expected)
        strided = torch.stack([shift, shift], 1)[:, 0]
        assert torch.equal(linear(view_x, view_w, strided, impl=impl.option), expected)


def test_gradients_through_strided_inputs(impl):
    x, w, _ = make(12, 60, 17, impl.dtypes[0], bias=False)
    joined = x.view(2, 6, 60).transpose(0, 1).requires_grad_()
    matrix = w.T.contiguous().T.requires_grad_()
    linear(joined, matrix, impl=impl.option).square().sum().backward()
    y = 2 * joined.detach() @ matrix.detach().T
    near = impl.near(1e-10, 1e-3)
    torch.testing.assert_close(joined.grad, y @ matrix.detach(), rtol=near, atol=near)
    torch.testing.assert_close(matrix.grad, torch.einsum("abn,abk->nk", y, joined.detach()), rtol=near, atol=near)


def test_empty_shapes(impl):
    b = torch.randn(3)
    assert torch.equal(linear(torch.empty(2, 0), torch.empty(3, 0), impl=impl.option), torch.zeros(2, 3))
    assert torch.equal(linear(torch.empty(2, 0), torch.empty(3, 0), b, impl=impl.option), b.expand(2, 3))
    assert linear(torch.randn(2, 4), torch.empty(0, 4), impl=impl.option).shape == (2, 0)
    x, w, b = (t.requires_grad_() for t in make(0, 4, 3))
    linear(x, w, b, impl=impl.option).sum().backward()
    assert torch.equal(w.grad, torch.zeros(3, 4))
    assert torch.equal(b.grad, torch.zeros(3))


def test_against_fresh_memory():
    """Outputs land in memory that held NaN: nothing of it may survive, at panel edges least of all."""
    for rows, inner, outputs in [(1, 513, 17), (7, 300, 15), (200, 600, 33)]:
        x, w, _ = make(rows, inner, outputs)
        for _ in range(3):
            torch.full((rows, outputs), float("nan"))
            assert bool(linear(x, w).isfinite().all())


def test_wrong_arguments_say_what_is_wrong():
    x, w, b = make(2, 4, 3)
    with pytest.raises(ToolkitError, match=r"impl of op linear must be one of reference.*got 'fast'"):
        linear(x, w, b, impl="fast")
    if has_native("linear"):
        with pytest.raises(RuntimeError, match="the last dimension of x must be 4"):
            linear(x[:, :3], w, b)
        with pytest.raises(RuntimeError, match="weight must have the dtype of x"):
            linear(x, w.double(), b)
        with pytest.raises(RuntimeError, match=r"bias must have shape \[3\]"):
            linear(x, w, b[:2])
        with pytest.raises(RuntimeError, match="x must have dtype float32, float64, bfloat16 or float16, got"):
            linear(x.int(), w.int())


def test_registration_is_sound():
    for requires_grad in (False, True):
        tensors = [t.requires_grad_(requires_grad) for t in make(3, 5, 4)]
        torch.library.opcheck(torch.ops.toolkit.linear.default, tensors)
        torch.library.opcheck(torch.ops.toolkit.linear.default, [*tensors[:2], None])


@impl_dtype_and(
    "rows, threads", [(rows, threads) for rows in (0, 1, 5, 200) for threads in (1, 2)], [(0, 1), (5, 1), (200, 1)]
)
def test_a_group_has_the_bits_of_its_members(impl, dtype, rows, threads):
    torch.set_num_threads(threads)
    x, *_ = make(rows, 300, 1, dtype)
    more = () if impl is REFERENCE or (SMALL and impl is TRITON) else (512, 2000)
    members = [make(1, 300, outputs, dtype, seed=outputs)[1:] for outputs in (17, 1, 64, *more)]
    biases = [bias if at % 2 else None for at, (_, bias) in enumerate(members)]
    group = linear_group(x, [weight for weight, _ in members], biases, impl=impl.option)
    assert len(group) == len(members)
    for y, (weight, _), bias in zip(group, members, biases):
        assert torch.equal(y, linear(x, weight, bias, impl=impl.option))


def test_groups_at_the_edges(impl):
    assert linear_group(torch.ones(2, 3), [], [], impl=impl.option) == []
    empty, full = linear_group(torch.ones(2, 0), [torch.ones(4, 0)] * 2, [None, torch.arange(4.0)], impl=impl.option)
    assert not empty.any()
    assert torch.equal(full, torch.arange(4.0).expand(2, 4))
    with pytest.raises((RuntimeError, ValueError)):
        linear_group(torch.ones(2, 3), [torch.ones(4, 3)], [], impl=impl.option)


def test_opcheck_of_groups():
    weights, biases = [torch.ones(4, 3), torch.ones(2, 3)], [None, torch.ones(2)]
    torch.library.opcheck(torch.ops.toolkit.linear_group.default, (torch.ones(2, 3), weights, biases))


# The Triton launcher: its tiles and its limits.
@only_triton
@pytest.mark.usefixtures("impl")
def test_rows_beyond_two_to_the_31_elements():
    x, weight, _ = make(3, 16, 3, torch.float16)
    expected = linear(x, weight)
    assert torch.equal(linear(far_apart(x), weight), expected)
    assert torch.equal(linear(x, far_apart(weight)), expected)


@only_interpreter
@pytest.mark.usefixtures("impl")
def test_a_decode_tile_serves_few_rows_where_it_was_measured(monkeypatch, tmp_path):
    cpu, base, small = torch.device("cpu"), GemmTile(32, 16, 16, 1, 1), GemmTile(16, 32, 16, 1, 1)
    monkeypatch.setitem(tiles.TABLE.entries["interpreter"], 4, ((None, base),))
    monkeypatch.setattr(tiles, "_decode_tiles", tiles._decode_tiles.__wrapped__)  # nothing of it is kept
    written = tmp_path / "measured_tiles.json"
    entry = {"device": "interpreter", "triton": version("triton"), "itemsize": 4}
    entry |= {"base": asdict(base), "tile": asdict(small)}

    def found(rows, **changes):
        written.write_text(json.dumps([entry | changes]))
        return tiles.find(cpu, torch.float32, 20, 40, rows)

    monkeypatch.setattr(tiles, "MEASURED", written)
    assert found(1) == found(DECODE_ROWS) == small
    x, weight, bias = make(70, 40, 20)
    some = torch.ops.toolkit.linear(x[:5], weight, bias)
    torch.testing.assert_close(some, torch.ops.toolkit.linear(x, weight, bias)[:5])
    for changes in ({"device": "NVIDIA H200"}, {"triton": "3.0.0"}, {"itemsize": 2}, {"base": asdict(small)}):
        assert found(1, **changes) == base
    assert found(DECODE_ROWS + 1) == base


def test_measured_tiles_are_of_tiles_that_are_shipped():
    """Each names its device, its Triton, a tile of the table and one of the candidates, and how much faster it was."""
    shipped = {(itemsize, tile) for row in tiles.TABLE.entries.values() for itemsize, choices in row.items()
               for _, tile in choices}  # fmt: skip
    tried = {(size, tile) for row in tiles.DECODE_CANDIDATES.values() for size, some in row.items() for tile in some}
    for entry in json.loads(tiles.MEASURED.read_text(encoding="utf-8")):
        assert (entry["itemsize"], GemmTile(**entry["base"])) in shipped
        assert (entry["itemsize"], GemmTile(**entry["tile"])) in tried
        assert entry["device"]
        assert entry["triton"]
        assert entry["time"]
        assert entry["speedup"] > 1.0


@only_interpreter
@pytest.mark.usefixtures("impl")
def test_bad_input_is_one_sentence():
    x, weight, bias = make(2, 4, 3)
    for arguments, words in [
        ((x.double(), weight.double(), None), "float64"),
        ((x, weight.half(), None), "must have the dtype of x"),
        ((x[:, :3], weight, None), r"x \[2, 3\] and weight \[3, 4\]"),
        ((x, weight, bias[:2]), r"bias \[2\]"),
        ((x.bfloat16(), weight.bfloat16(), None), "must be float32 or float16 in Triton's interpreter"),
    ]:
        with pytest.raises(ToolkitError, match=words):
            torch.ops.toolkit.linear(*arguments)
