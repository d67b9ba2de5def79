"""A quantised weight is the dense weight that it dequantises to: in linear layers, in any other op, and kept as one."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.quantised import VARIANTS
from toolkit.errors import ToolkitError
from toolkit.modules.linear import linear_forward
from toolkit.ops.linear import linear, linear_group
from toolkit.ops.quantised_linear import makers
from toolkit.quantised import QuantisedWeight

FORMATS = makers()


def layer_of(format, outputs=40, inputs=96, dtype=torch.float32, bias=True, seed=0):
    """A linear layer with a quantised weight, and one with the dense weight that it stands for."""
    torch.manual_seed(seed)
    quantised = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    quantised.weight = nn.Parameter(QuantisedWeight.of(quantised.weight, format), requires_grad=False)
    dense = copy.deepcopy(quantised)
    dense.weight = nn.Parameter(quantised.weight.dequantise(), requires_grad=False)
    assert type(dense.weight) is nn.Parameter
    return quantised, dense


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_linear_has_the_bits_of_the_dense_weight_forward_and_backward(format, dtype):
    quantised, dense = layer_of(format, dtype=dtype)
    for rows in (1, 3, 70):
        results = []
        for layer in (quantised, dense):
            x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows)).to(dtype).requires_grad_()
            y = linear_forward(layer, x)
            gradients = torch.autograd.grad(y.double().pow(2).sum(), [x, layer.bias])
            results.append((y, *gradients))
        for one, other in zip(*results, strict=True):
            assert one.dtype == other.dtype == dtype
            assert torch.equal(one, other)


@pytest.mark.parametrize("format", FORMATS)
def test_the_weight_is_near_the_one_that_was_quantised(format):
    torch.manual_seed(0)
    weight = torch.randn(40, 256)
    error = (QuantisedWeight.of(weight, format).dequantise() - weight).norm() / weight.norm()
    assert error < {"int4": 0.12, "nf4": 0.12}.get(format, 0.03)


def test_other_ops_see_the_dense_weight():
    quantised, dense = layer_of("nf4")
    w, d = quantised.weight, dense.weight
    x = torch.randn(3, 96)
    for op in (
        lambda w: x @ w.t(),
        lambda w: w[3:5],
        lambda w: w + 1,
        lambda w: w.float().norm(dim=1),
        lambda w: F.embedding(torch.tensor([1, 5]), w),
        lambda w: torch.cat([w, w]),
        lambda w: F.linear(w, x),
        lambda w: w.reshape(-1, 2),
        lambda w: torch.zeros(40, 96).copy_(w),
        lambda w: linear_group(x, [w, w], [None, None])[1],
    ):
        assert torch.equal(op(w), op(d))
        assert type(op(w)) is torch.Tensor


def test_experts_are_three_dimensional():
    torch.manual_seed(0)
    weight = torch.randn(3, 20, 64)
    quantised = QuantisedWeight.of(weight, "int8")
    assert quantised.shape == (3, 20, 64)
    assert torch.equal(quantised[1], QuantisedWeight.of(weight[1], "int8").dequantise())
    assert torch.equal(F.linear(weight[0], quantised[2]), F.linear(weight[0], quantised.dequantise()[2]))


def test_gradients_pass_through_any_op():
    quantised, dense = layer_of("int8")
    x = torch.randn(3, 96, requires_grad=True)
    (found,) = torch.autograd.grad((x @ quantised.weight.t()).pow(2).sum(), x)
    (wanted,) = torch.autograd.grad((x @ dense.weight.t()).pow(2).sum(), x)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("format", FORMATS)
def test_what_keeps_the_format(format):
    layer, _ = layer_of(format)
    weight, dense = layer.weight, layer.weight.dequantise()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    kept = {
        "detach": weight.detach(),
        "data": weight.data,
        "clone": weight.clone(),
        "deepcopy": copy.deepcopy(layer).weight,
        "pickle": pickle.loads(pickle.dumps(weight)),
        "torch.save": torch.load(file, weights_only=True)["weight"],
        "to a device": weight.to("cpu", copy=True),
    }
    for name, one in kept.items():
        assert isinstance(one, QuantisedWeight), name
        assert one.format == format
        assert one.dtype == torch.float32
        assert torch.equal(one.dequantise(), dense), name
        assert not one.requires_grad
    for name in ("deepcopy", "pickle"):
        assert isinstance(kept[name], nn.Parameter)
    assert kept["clone"].codes.data_ptr() != weight.codes.data_ptr() == kept["detach"].codes.data_ptr()


def test_another_dtype_is_what_the_weight_dequantises_to():
    layer, _ = layer_of("nf4")
    exact = layer.weight.dequantise(torch.float32)
    layer.to(torch.bfloat16)
    assert isinstance(layer.weight, QuantisedWeight)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight.dequantise(), exact.to(torch.bfloat16))
    layer.to(torch.float32)
    assert torch.equal(layer.weight.dequantise(), exact)
    assert layer.weight.to(torch.int32).dtype == torch.int32


def test_autocast_rounds_as_the_dense_weight_is_rounded():
    quantised, dense = layer_of("int4")
    x = torch.randn(5, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_forward(quantised, x), linear_forward(dense, x))
        assert quantised(x).dtype == torch.bfloat16


def test_inputs_of_another_dtype_are_refused_as_by_a_dense_weight():
    quantised, _ = layer_of("int8")
    for call in (lambda x: quantised(x), lambda x: linear(x, quantised.weight)):
        with pytest.raises(RuntimeError):
            call(torch.randn(2, 96, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.zero_(),
        lambda w: w.add_(1),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.copy_(torch.zeros(40, 96)),
        lambda w: nn.init.normal_(w),
    ],
)
def test_writes_in_place_are_refused(write):
    layer, _ = layer_of("int8")
    before = layer.weight.dequantise()
    with torch.no_grad(), pytest.raises(ToolkitError, match=r"a weight in int8 must not be written in place, got \w+"):
        write(layer.weight)
    assert torch.equal(layer.weight.dequantise(), before)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "q4_k"])
def test_rounding_in_place_makes_the_codes_that_quantising_makes(variant):
    format, options = VARIANTS[variant]
    torch.manual_seed(0)
    first, second = torch.randn(2, 40, 192)
    weight = QuantisedWeight.of(first, format, **options)
    address = weight.codes.data_ptr()
    assert weight.quantise_(second) is weight
    wanted = QuantisedWeight.of(second, format, **options)
    assert weight.codes.data_ptr() == address
    assert len(weight.scales) == len(wanted.scales)
    for one, other in zip((weight.codes, *weight.scales), (wanted.codes, *wanted.scales)):
        assert one.dtype == other.dtype
        assert torch.equal(one.float(), other.float())


def test_what_is_rounded_in_place_fits():
    weight = layer_of("int8")[0].weight
    with pytest.raises(ToolkitError, match=r"dense must have shape \[40, 96\], got \[96, 40\]"):
        weight.quantise_(torch.zeros(96, 40))
    with pytest.raises(ToolkitError, match="must be finite"):
        weight.quantise_(torch.full((40, 96), torch.nan))


@pytest.mark.parametrize("format", FORMATS)
def test_its_gradient_is_that_of_the_dense_weight(format):
    quantised, dense = layer_of(format)
    ids = torch.tensor([1, 5])
    x = torch.randn(3, 96)
    for op in (
        lambda w: linear(x, w),
        lambda w: F.linear(x.bfloat16(), w.bfloat16()),
        lambda w: x @ w.t(),
        lambda w: F.embedding(ids, w),
    ):
        gradients = []
        for layer in (quantised, dense):
            layer.weight.requires_grad_()
            y = op(layer.weight)
            assert torch.equal(y.detach(), op(layer.weight.detach()))
            gradients.append(torch.autograd.grad(y.float().pow(2).sum(), layer.weight)[0])
        assert type(gradients[0]) is torch.Tensor
        assert torch.equal(*gradients)
    copies = [copy.deepcopy(quantised.weight), pickle.loads(pickle.dumps(quantised.weight))]
    assert all(isinstance(one, nn.Parameter) and one.requires_grad for one in copies)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_an_optimizer_that_writes_weights_is_refused(options):
    layer, _ = layer_of("int8")
    layer.weight.requires_grad_().grad = torch.ones(40, 96)
    before = layer.weight.dequantise()
    with pytest.raises(ToolkitError, match="a weight in int8 must not be written in place"):
        torch.optim.AdamW([layer.weight], **options).step()
    assert torch.equal(layer.weight.dequantise(), before)


def test_load_state_dict_writes_codes_of_the_same_format():
    layer, _ = layer_of("int8")
    other, _ = layer_of("int8", seed=1)
    address = layer.weight.codes.data_ptr()
    layer.load_state_dict(other.state_dict())
    assert layer.weight.codes.data_ptr() == address
    assert torch.equal(layer.weight.dequantise(), other.weight.dequantise())
    dense = {"weight": torch.zeros(40, 96), "bias": torch.zeros(40)}
    with pytest.raises((ToolkitError, RuntimeError), match="must not be written in place"):
        layer.load_state_dict(dense)


def test_bytes_and_sizes():
    weight = layer_of("int8")[0].weight
    assert weight.numel() == 40 * 96
    assert weight.nbytes == 40 * 96 * 4
    assert weight.quantised_bytes == 48 * 96 + 48 * 4  # outputs in panels of 16
    assert repr(weight) == "QuantisedWeight('int8', shape=[40, 96], dtype=torch.float32, device=cpu)"


def test_torch_compile_sees_the_same_layer():
    quantised, dense = layer_of("nf4")
    x = torch.randn(4, 96)
    compiled = torch.compile(lambda layer, x: linear_forward(layer, x), backend="aot_eager")
    assert torch.equal(compiled(quantised, x), linear_forward(dense, x))


@pytest.mark.parametrize("format", makers())
def test_embeddings_read_their_rows_alone(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise the rows of the dequantised weight, of which no more than the rows' panels is made."""
    weight = QuantisedWeight.of(torch.randn(640, 96, generator=torch.Generator().manual_seed(0)), format)
    dense, ids = weight.dequantise(), torch.tensor([[0, 639, 17], [17, 5, 320]])
    monkeypatch.setattr(QuantisedWeight, "dequantise", lambda *_: pytest.fail("the whole weight was made"))
    assert torch.equal(torch.nn.functional.embedding(ids, weight), dense[ids])
    assert torch.equal(torch.nn.functional.embedding(ids[:0], weight), dense[ids[:0]])
