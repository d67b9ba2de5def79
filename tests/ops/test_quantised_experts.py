"""quantised_experts has the bits of ``experts`` with the dequantised weights: outputs, gradients, any schedule."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.helpers.implementations import REFERENCE, TRITON, implementations
from tests.helpers.moe import routing
from tests.helpers.quantised import VARIANTS, packed
from tests.helpers.rowwise import seeded
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.experts import experts
from toolkit.ops.quantised_experts import CodedWeight, quantised_experts
from toolkit.ops.quantised_linear import dequantise
from toolkit.ops.registry import has_native
from toolkit.quantised import QuantisedWeight

pytestmark = pytest.mark.usefixtures("one_thread")
needs_native = pytest.mark.skipif(not has_native("quantised_experts"), reason="needs the native kernels")


@dataclass
class Layer:
    """Experts of one shape in one format, and options of the op."""

    variant: str
    count: int = 5
    hidden: int = 64
    inner: int = 48
    gated: bool = True
    biased: bool = False
    top_k: int = 2
    score_position: str = "activation"
    activation: str = "silu"

    def __post_init__(self) -> None:
        width = 2 * self.inner if self.gated else self.inner
        self.shapes = (self.count, width, self.hidden), (self.count, self.hidden, self.inner)
        self.coded = []
        for at, (count, outputs, inputs) in enumerate(self.shapes):
            name, codes, scales = packed(self.variant, count * outputs, inputs, seed=at)
            self.coded.append(CodedWeight(codes, scales, name))

    def dense(self, dtype: torch.dtype) -> list[Tensor]:
        return [
            dequantise(one.codes, one.scales, one.format, count * outputs, inputs, dtype).view(count, outputs, inputs)
            for one, (count, outputs, inputs) in zip(self.coded, self.shapes)
        ]

    def inputs(self, tokens: int, dtype: torch.dtype) -> list[Tensor]:
        """x, topk_weights and the biases, as leaves that want a gradient."""
        made = [
            seeded(tokens, self.hidden, dtype=dtype, scale=0.02),
            seeded(tokens, self.top_k, dtype=dtype, seed=1).sigmoid(),
        ]
        if self.biased:
            made += [seeded(*shape[:2], dtype=dtype, seed=at) for at, shape in enumerate(self.shapes, 5)]
        return [one.requires_grad_() for one in made]

    def run(self, inputs: list[Tensor], ids: Tensor, weights: list, impl: str | None = None) -> Tensor:
        x, topk_weights, *biases = inputs
        options: dict = {"score_position": self.score_position, "impl": impl}
        if biases:
            options |= {"up_bias": biases[0], "down_bias": biases[1]}
        plan = dispatch_plan(ids, self.count)
        if isinstance(weights[0], CodedWeight):
            shape = self.inner, self.gated
            return quantised_experts(x, topk_weights, *weights, plan, *shape, self.activation, **options)[0]
        return experts(x, topk_weights, *weights, plan, self.activation, **options)


def check(layer: Layer, tokens: int, routed: str, dtype: torch.dtype) -> None:
    """Outputs and gradients of the codes and of the dense weights."""
    ids = routing(routed, tokens, layer.top_k, layer.count)
    grad = seeded(tokens, layer.hidden, dtype=dtype, seed=9)
    found = []
    for weights in (layer.coded, layer.dense(dtype)):
        inputs = layer.inputs(tokens, dtype)
        out = layer.run(inputs, ids, weights)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
    assert found[0][0].dtype == dtype
    for at, (one, other) in enumerate(zip(*found, strict=True)):
        assert torch.equal(one, other), (layer, tokens, routed, at)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_has_the_bits_of_experts_with_the_dequantised_weights(variant, dtype):
    layers = [Layer(variant), Layer(variant, hidden=80, inner=521 // 16 * 16, biased=True, top_k=3)]
    for layer in layers:
        for tokens in (1, 2, 7, 60):
            check(layer, tokens, "random", dtype)


@needs_native
@pytest.mark.parametrize("routed", ["empty experts", "one expert", "skipped slots"])
def test_every_routing_and_score_position(routed):
    for position in ("activation", "combine", "input"):
        for gated, biased in ((True, True), (False, False)):
            layer = Layer("int4", gated=gated, biased=biased, score_position=position, activation="silu")
            for tokens in (1, 5, 70):
                check(layer, tokens, routed, torch.float32)


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_has_its_bits_in_any_batch(threads):
    """Alone, among few rows of its experts and among many."""
    torch.set_num_threads(threads)
    layer = Layer("nf4", count=4, hidden=256, inner=320)
    x, topk_weights = layer.inputs(200, torch.float32)
    ids = routing("random", 200, 2, 4)
    with torch.no_grad():
        whole = layer.run([x, topk_weights], ids, layer.coded)
        for rows in ([3], [3, 8, 50], list(range(30)), list(range(3, 150))):
            some = layer.run([x[rows], topk_weights[rows]], ids[rows], layer.coded)
            assert torch.equal(some, whole[rows])


@needs_native
def test_sizes_that_are_no_whole_panels_and_none():
    for hidden, inner, tokens in ((40, 24, 5), (64, 40, 5), (24, 16, 3), (64, 48, 0)):
        check(Layer("int8", hidden=hidden, inner=inner), tokens, "random", torch.float32)


@implementations(REFERENCE, TRITON)
def test_other_implementations_dequantise(impl):
    layer = Layer("int4", count=3, hidden=32, inner=16)
    inputs = [one.detach() for one in layer.inputs(3, torch.float32)]
    ids = routing("random", 3, 2, 3)
    found, wanted = (
        layer.run(inputs, ids, weights, impl=impl.option) for weights in (layer.coded, layer.dense(torch.float32))
    )
    assert torch.equal(found, wanted)


def test_experts_of_quantised_weights_are_this_op():
    layer = Layer("nf4", biased=True)
    ids = routing("random", 6, 2, layer.count)
    weights = [
        QuantisedWeight(one.format, one.codes, one.scales, shape, torch.float32)
        for one, shape in zip(layer.coded, layer.shapes)
    ]
    found = []
    for given in (weights, layer.dense(torch.float32)):
        inputs = layer.inputs(6, torch.float32)
        out = layer.run(inputs, ids, given)
        assert "quantised_experts" in type(out.grad_fn).__name__ or given is not weights
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_operator_registration():
    layer = Layer("int8", count=3, hidden=32, inner=16, biased=True)
    x, topk_weights, up_bias, down_bias = layer.inputs(3, torch.float32)
    (codes, scales, format), (other, more, kind) = layer.coded
    plan = dispatch_plan(routing("random", 3, 2, 3), 3)
    arguments = (
        x, topk_weights, codes, scales, format, up_bias, other, more, kind, down_bias, *plan, 16, True, "silu",
        "activation", False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.toolkit.quantised_experts.default, arguments)
    with torch.no_grad():
        out, z = torch.ops.toolkit.quantised_experts(*arguments)
    given = (out, x, topk_weights, z, codes, scales, format, other, more, kind, down_bias, *plan)
    given = [one.detach() if isinstance(one, torch.Tensor) else one for one in given]
    backward = (*given, 16, True, "silu", "activation", False, True, True, True, True)
    torch.library.opcheck(torch.ops.toolkit.quantised_experts_backward.default, backward)


@needs_native
def test_what_does_not_fit_is_refused():
    layer = Layer("int8", count=3, hidden=32, inner=16)
    x, topk_weights = (one.detach() for one in layer.inputs(3, torch.float32))
    plan = dispatch_plan(routing("random", 3, 2, 3), 3)
    up, down = layer.coded
    with pytest.raises(RuntimeError, match="int8: codes must be Char of shape"):
        quantised_experts(x, topk_weights, down, up, plan, 16, True, "silu")
    with pytest.raises(RuntimeError, match="a bias must be"):
        quantised_experts(x, topk_weights, up, down, plan, 16, True, "silu", up_bias=torch.zeros(3, 5))
    with pytest.raises(RuntimeError, match="x, topk_weights and the plan must fit together"):
        quantised_experts(x[:2], topk_weights, up, down, plan, 16, True, "silu")
