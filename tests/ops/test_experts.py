"""experts: outputs and every gradient against a loop over experts in float64, and bits over random schedules."""

import random

import pytest
import torch
from torch import Tensor

from tests.helpers.implementations import only_triton
from tests.helpers.interpreter import close
from tests.helpers.moe import LAYERS, ROUTINGS, Layer, gradients_of, routing
from tests.helpers.moe_dense import LAYOUTS, dense_experts, exact_gradients, layer, normal
from tests.helpers.moe_dense import routing as routing_of_triton
from tests.helpers.rowwise import TOLERANCE, error, seeded, threads
from toolkit.errors import ToolkitError
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.experts import experts
from toolkit.ops.registry import has_native

IMPLEMENTATIONS = ["reference", "cpu"] if has_native("experts") else ["reference"]
every_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
every_layer = pytest.mark.parametrize("name", LAYERS)
native_only = pytest.mark.skipif(
    not has_native("experts"), reason="the order of sums is a promise of the native kernel"
)
# An output of a narrow type has passed through z, the activation and the products' outputs, each rounded to it.
NARROW = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
SCORES = 1  # among the inputs


def gradients(layer: Layer, inputs: list[Tensor], ids: Tensor, grad: Tensor, **how) -> list[Tensor]:
    """The output, then the gradient of every input."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    out = layer.run(leaves, ids, **how)
    return [out.detach(), *gradients_of(out, leaves, grad)]


def check(layer: Layer, tokens: int, routed: str, impl: str, dtype: torch.dtype = torch.float32) -> None:
    inputs, ids = layer.inputs(tokens, dtype), routing(routed, tokens, layer.slots, layer.experts)
    grad = seeded(tokens, layer.width, seed=9, dtype=dtype)
    leaves = [value.double().requires_grad_() for value in inputs]
    exact = layer.oracle(leaves, ids)
    wanted = gradients_of(exact, leaves, grad.double())
    # In float32 16 roundings of the largest value: sums of these lengths in blocks lose less.
    bound = NARROW.get(dtype, TOLERANCE[dtype])
    out, *found = gradients(layer, inputs, ids, grad, impl=impl)
    assert out.dtype == dtype
    assert error(out, exact.detach()) <= bound
    for at, (got, value) in enumerate(zip(found, wanted, strict=True)):
        assert got.dtype == dtype
        if at == SCORES and tokens:
            # The product of a token's gradient with an output may cancel: it is judged by the former's length.
            length = grad.double().norm(dim=-1).max().expand(1, layer.slots)
            got, value = torch.cat([got.double(), length]), torch.cat([value, length])
        assert error(got, value) <= bound


@every_impl
@every_layer
@pytest.mark.parametrize("routed", ROUTINGS)
def test_outputs_and_every_gradient_match_fp64(impl, name, routed):
    for tokens in (0, 1, 5, 97):
        check(LAYERS[name], tokens, routed, impl)


@every_impl
@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(impl, name, dtype):
    check(LAYERS[name], 41, "skipped slots", impl, dtype)


@every_impl
@pytest.mark.parametrize("routed", ROUTINGS)
@pytest.mark.parametrize("name", ["halves", "as gpt-oss", "at the input"])
def test_a_thousand_tokens(impl, routed, name):
    check(LAYERS[name], 1000, routed, impl)


@every_impl
def test_more_tokens_than_four_thousand(impl):
    check(Layer(width=16, inner=8, biases=True), 4097, "skewed", impl)


@every_impl
@every_layer
def test_a_needle_keeps_its_bits(impl, name):
    """The same token, experts and scores: any index, any number of tokens, any neighbours, 1 or 2 threads."""
    layer, rng = LAYERS[name], random.Random(0)
    x, scores, *weights = layer.inputs(450)
    ids = routing("skipped slots" if layer.slots > 1 else "uniform", 450, layer.slots, layer.experts, 3)
    needle = 4
    assert bool((ids[needle] < layer.experts).any())
    alone = layer.run([x[needle : needle + 1], scores[needle : needle + 1], *weights], ids[needle : needle + 1], impl)
    for trial in range(12):
        tokens = rng.choice([1, 2, 3, 7, 30, 200, 450])
        index = rng.randrange(tokens)
        neighbours = torch.randint(450, (tokens,))
        neighbours[index] = needle
        with threads(trial % 2 + 1):
            routed = (
                ids[neighbours]
                if trial % 3
                else routing(rng.choice(ROUTINGS), tokens, layer.slots, layer.experts, trial)
            )
            routed[index] = ids[needle]
            out = layer.run([x[neighbours], scores[neighbours], *weights], routed, impl)
        assert torch.equal(out[index], alone[0]), (trial, tokens, index)


@every_impl
@every_layer
@pytest.mark.parametrize("routed", ROUTINGS)
def test_a_prefill_has_the_bits_of_its_decodes(impl, name, routed):
    layer = LAYERS[name]
    x, scores, *weights = layer.inputs(23)
    ids = routing(routed, 23, layer.slots, layer.experts)
    whole = layer.run([x, scores, *weights], ids, impl)
    steps = [layer.run([x[t : t + 1], scores[t : t + 1], *weights], ids[t : t + 1], impl) for t in range(23)]
    assert torch.equal(whole, torch.cat(steps))


@native_only
@every_layer
def test_gradients_have_the_same_bits_on_every_run_and_any_threads(name):
    layer = LAYERS[name]
    inputs, grad = layer.inputs(600), seeded(600, layer.width, seed=9, dtype=torch.float32)
    ids = routing("skewed", 600, layer.slots, layer.experts)
    with threads(1):
        first = gradients(layer, inputs, ids, grad)
    for n in (1, 2, 2):
        with threads(n):
            assert all(torch.equal(*pair) for pair in zip(first, gradients(layer, inputs, ids, grad)))


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_gradients_have_the_same_bits(name, dtype):
    layer = LAYERS[name]
    inputs, grad = layer.inputs(60, dtype), seeded(60, layer.width, seed=9, dtype=dtype)
    ids = routing("skipped slots", 60, layer.slots, layer.experts)
    kept, taken = (gradients(layer, inputs, ids, grad, recompute=again) for again in (False, True))
    assert all(torch.equal(*pair) for pair in zip(kept, taken))


def saved_shapes(layer: Layer, inputs: list[Tensor], ids: Tensor, recompute: bool) -> set[tuple[int, ...]]:
    """Shapes of the floating-point tensors that are saved beside the inputs."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    found = set()

    def note(value: Tensor) -> Tensor:
        if value.is_floating_point() and value.untyped_storage().data_ptr() not in own:
            found.add(tuple(value.shape))
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        layer.run(leaves, ids, recompute=recompute)
    return found


@pytest.mark.parametrize("name", ["halves", "as gpt-oss", "at the combine", "at the input"])
def test_what_is_saved(name):
    layer = LAYERS[name]
    inputs, ids = layer.inputs(10), routing("uniform", 10, layer.slots, layer.experts)
    assert saved_shapes(layer, inputs, ids, False) == {(10 * layer.slots, 2 * layer.inner)}
    assert saved_shapes(layer, inputs, ids, True) == set()


@every_impl
def test_only_the_gradients_asked_for_and_experts_without_rows(impl):
    layer = LAYERS["biases"]
    ids = torch.tensor([[1, 3], [3, 1], [1, 5]])
    full = gradients(layer, layer.inputs(3), ids, torch.ones(3, layer.width), impl=impl)[1:]
    for value in full[2:]:
        assert not value[[0, 2, 4]].any()
        assert value[[1, 3]].flatten(1).any(1).all()
    for wanted in range(1, 64):
        leaves = [leaf.requires_grad_(bool(wanted >> i & 1)) for i, leaf in enumerate(layer.inputs(3))]
        layer.run(leaves, ids, impl).sum().backward()
        for i, (leaf, value) in enumerate(zip(leaves, full)):
            assert (leaf.grad is not None) == bool(wanted >> i & 1)
            assert leaf.grad is None or error(leaf.grad, value) <= TOLERANCE[torch.float32]


@every_impl
@every_layer
def test_strides_do_not_change_bits(impl, name):
    layer = LAYERS[name]
    inputs, ids = layer.inputs(20), routing("uniform", 20, layer.slots, layer.experts)
    grad = seeded(20, layer.width, seed=9, dtype=torch.float32)
    strided = [torch.stack([value, -value], -1)[..., 0] for value in inputs]
    turned = [value.mT.contiguous().mT for value in inputs]
    dense = gradients(layer, inputs, ids, grad, impl=impl)
    for views in (strided, turned):
        assert torch.equal(layer.run(views, ids, impl), dense[0])
        leaves = [value.requires_grad_() for value in views]
        cotangent = torch.stack([grad, grad], -1)[..., 0]
        for got, wanted in zip(torch.autograd.grad(layer.run(leaves, ids, impl), leaves, cotangent), dense[1:]):
            assert error(got, wanted) <= (0 if impl == "cpu" else TOLERANCE[torch.float32])


@every_impl
@every_layer
def test_nan_stays_with_its_token_and_its_expert(impl, name):
    layer = LAYERS[name]
    x, scores, up, *rest = layer.inputs(60)
    ids = routing("skipped slots", 60, layer.slots, layer.experts)
    clean = layer.run([x, scores, up, *rest], ids, impl)
    x[7], scores[ids == layer.experts], up[0] = float("nan"), float("nan"), float("nan")
    out = layer.run([x, scores, up, *rest], ids, impl)
    dirty = (ids == 0).any(-1)
    dirty[7] = bool((ids[7] < layer.experts).any())
    assert torch.equal(out[~dirty], clean[~dirty])
    assert bool(out[dirty].isnan().all())


@every_impl
def test_tokens_without_experts_and_scores_of_zero(impl):
    layer = LAYERS["biases"]
    inputs = layer.inputs(6)
    assert not layer.run(inputs, torch.full((6, 2), 5), impl).any()
    inputs[1].zero_()
    assert not layer.run(inputs, routing("uniform", 6, 2, 5), impl).any()


@every_impl
def test_scores_may_be_wider_than_the_rest(impl):
    layer = LAYERS["biases"]
    inputs, ids = layer.inputs(30, torch.bfloat16), routing("uniform", 30, 2, 5)
    inputs[1] = layer.inputs(30)[1].requires_grad_()
    out = layer.run(inputs, ids, impl)
    out.sum().backward()
    assert (out.dtype, inputs[1].grad.dtype) == (torch.bfloat16, torch.float32)
    assert error(out.detach(), layer.oracle([value.detach().double() for value in inputs], ids)) <= NARROW[out.dtype]


def test_wrong_arguments_are_one_sentence():
    layer = LAYERS["biases"]
    x, scores, up, down, up_bias, down_bias = layer.inputs(4)
    plan = dispatch_plan(routing("uniform", 4, 2, 5), 5)
    for arguments, extra, words in [
        (
            (x, scores, up, down, plan, "silu"),
            {"score_position": "end"},
            "score_position must be one of activation, combine, input, got 'end'",
        ),
        ((x[0], scores, up, down, plan, "silu"), {}, r"experts needs x \[T, H\], up"),
        ((x[:, :5], scores, up, down, plan, "silu"), {}, "that fit together, got"),
        ((x, scores, up[:4], down, plan, "silu"), {}, "that fit together, got"),
        ((x, scores[:, :1], up, down, plan, "silu"), {}, r"experts needs x \[T, H\], topk_weights"),
        ((x, scores, up, down, plan, "no"), {}, "no"),
        ((x, scores, up, down, plan, "silu"), {"up_bias": down_bias}, "up_bias must be"),
        ((x, scores, up.double(), down, plan, "silu"), {}, "experts needs one dtype for x, up and down"),
    ]:
        with pytest.raises(ToolkitError, match=words):
            experts(*arguments, **extra)
    if has_native("experts"):
        for arguments, words in [
            (
                (x, scores, up, up_bias, down, down_bias, *plan, "silu", "end", False, False),
                "score_position must be one of .*, got 'end'",
            ),
            ((x, scores, up, up_bias, down[:2], None, *plan, "silu", "input", False, False), "must fit together"),
            ((x, scores, up, up_bias[:2], down, None, *plan, "silu", "input", False, False), "a bias must be"),
        ]:
            with pytest.raises(RuntimeError, match=words):
                torch.ops.toolkit.experts(*arguments)


@every_layer
def test_opcheck(name):
    layer = LAYERS[name]
    ids = routing("skipped slots", 5, layer.slots, layer.experts)
    plan = dispatch_plan(ids, layer.experts)
    flags = (layer.activation, layer.score_position, layer.transposed, layer.interleaved)
    for needs in (False, True):
        x, scores, up, down, *biases = (value.requires_grad_(needs) for value in layer.inputs(5))
        up_bias, down_bias = biases or (None, None)
        torch.library.opcheck(
            torch.ops.toolkit.experts.default, (x, scores, up, up_bias, down, down_bias, *plan, *flags)
        )  # fmt: skip
    x, scores, up, down, *biases = layer.inputs(5)
    z = torch.ops.toolkit.experts(x, scores, up, None, down, None, *plan, *flags)[1]
    for needs in ((True,) * 6, (False, True, False, True, False, True)):
        torch.library.opcheck(
            torch.ops.toolkit.experts_backward.default,
            (torch.ones_like(x), x, scores, z, up, down, biases[1] if biases else None, *plan, *flags, *needs),
        )


def test_compiles_into_one_graph():
    layer = LAYERS["as gpt-oss"]
    ids = routing("skipped slots", 9, layer.slots, layer.experts)
    compiled = torch.compile(lambda ids, *inputs: layer.run(list(inputs), ids) * 2, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, lambda ids, *inputs: layer.run(list(inputs), ids) * 2):
        leaves = [value.requires_grad_() for value in layer.inputs(9)]
        out = function(ids, *leaves)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    assert all(torch.equal(*pair) for pair in zip(*results))


# The Triton launchers: their tiles, splits and limits.
launch_dispatch_plan = torch.ops.toolkit.dispatch_plan
launch_experts = torch.ops.toolkit.experts
experts_backward = torch.ops.toolkit.experts_backward
grouped_linear = torch.ops.toolkit.grouped_linear


EXPERTS = 3


# Sums of some tens of terms one after the other; 16 bits: z, a, y and their gradients are rounded on the way.
NEAR = {torch.float32: 4e-6, torch.float16: 2**-9}


ALL = [True] * 6


CASES = [(layout, torch.float32) for layout in LAYOUTS] + [(layout, torch.float16) for layout in LAYOUTS[:6:2]]


def made(layout, tokens=9, slots=2, hidden=33, inner=17, dtype=torch.float32, scored=torch.float32):
    """(x, scores, up, up_bias, down, down_bias), ids, flags, grad."""
    kind, gated, biased, score_position, transposed, interleaved = layout
    x, scores = normal(tokens, hidden, dtype=dtype), normal(tokens, slots, seed=9).abs().to(scored)
    inputs = [x, scores, *layer(EXPERTS, hidden, inner, gated, biased, transposed, dtype)]
    grad = normal(tokens, hidden, dtype=dtype, seed=10)
    return inputs, routing_of_triton(tokens, slots, EXPERTS), (kind, score_position, transposed, interleaved), grad


def backward(grad, inputs, z, plan, flags, needs=ALL):
    x, scores, up, _, down, down_bias = inputs
    biased = down_bias is not None
    needs = [need and (biased or index not in (3, 5)) for index, need in enumerate(needs)]
    return experts_backward(grad, x, scores, z, up, down, down_bias, *plan, *flags, *needs)


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize(("layout", "dtype"), CASES)
def test_outputs_and_gradients_match_fp64(layout, dtype):
    inputs, ids, flags, grad = made(layout, dtype=dtype, scored=dtype)
    plan = launch_dispatch_plan(ids, EXPERTS, 16)
    out, z = launch_experts(*inputs, *plan, *flags)
    assert out.dtype == z.dtype == dtype
    upcast = [None if t is None else t.double() for t in inputs]
    close(out, dense_experts(*upcast, ids, *flags), NEAR[dtype])
    assert int(torch.count_nonzero(z[int(plan[2][-1]) :])) == 0
    got = backward(grad, inputs, z, plan, flags)
    for value, exact, like in zip(got, exact_gradients(inputs, grad, ids, *flags), inputs, strict=True):
        if exact is None:
            assert value.numel() == 0
            continue
        assert value.dtype == like.dtype
        close(value, exact, NEAR[dtype])
    assert all(int(torch.count_nonzero(one[1])) == 0 for one in got[2:] if one.numel())


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pre_activation_is_the_grouped_product_to_the_bit(layout):
    """What a backward that takes the first product again relies on."""
    from toolkit.ops.experts.triton import input_rows

    inputs, ids, flags, _ = made(layout, hidden=40)
    x, scores, up, up_bias, _, _ = inputs
    plan, score_position = launch_dispatch_plan(ids, EXPERTS, 16), flags[1]
    source = input_rows(x, scores, *plan[:3], score_position)
    again = grouped_linear(source, up, up_bias, *plan, score_position != "input", flags[2])
    assert torch.equal(launch_experts(*inputs, *plan, *flags)[1], again)


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3], LAYOUTS[5]])
def test_a_token_keeps_its_bits_beside_any_batch_neighbours(layout):
    tokens = 9
    inputs, ids, flags, grad = made(layout, tokens, hidden=20)

    def both(some, tile=16):
        part = [inputs[0][some], inputs[1][some], *inputs[2:]]
        plan = launch_dispatch_plan(ids[some], EXPERTS, tile)
        out, z = launch_experts(*part, *plan, *flags)
        needs = [True, True, False, False, False, False]
        return out, *backward(grad[some], part, z, plan, flags, needs)[:2]

    whole = both(torch.arange(tokens))
    for tile in (16, 5):  # again, and by another plan
        for one, other in zip(both(torch.arange(tokens), tile), whole, strict=True):
            assert torch.equal(one, other)
    generator = torch.Generator().manual_seed(2)
    for size in (1, 5):
        some = torch.randperm(tokens, generator=generator)[:size]
        for one, other in zip(both(some), whole, strict=True):
            assert torch.equal(one, other[some])
    inputs[0][4] = torch.nan
    others = torch.arange(tokens) != 4
    for one, other in zip(both(torch.arange(tokens)), whole, strict=True):
        assert torch.equal(one[others], other[others])


@only_triton
@pytest.mark.usefixtures("impl")
def test_scores_of_another_dtype_and_only_what_is_needed():
    inputs, ids, flags, grad = made(LAYOUTS[1], dtype=torch.float16)
    plan = launch_dispatch_plan(ids, EXPERTS, 64)
    out, z = launch_experts(*inputs, *plan, *flags)
    upcast = [t.double() for t in inputs]
    close(out, dense_experts(*upcast, ids, *flags), NEAR[torch.float16])
    whole = backward(grad, inputs, z, plan, flags)
    assert whole[1].dtype == torch.float32
    close(whole[1], exact_gradients(inputs, grad, ids, *flags)[1], NEAR[torch.float16])
    for wanted in ({0, 3, 5}, {1}, {2, 4}):
        needs = [index in wanted for index in range(6)]
        for index, value in enumerate(backward(grad, inputs, z, plan, flags, needs)):
            assert torch.equal(value, whole[index]) if index in wanted else value.numel() == 0


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("score_position", ["activation", "input"])
def test_no_tokens_no_experts_and_all_skipped(score_position):
    for tokens, skipped in ((0, False), (5, True)):
        inputs, ids, flags, grad = made(("silu", True, True, score_position, False, False), tokens)
        ids = torch.full_like(ids, EXPERTS) if skipped else ids
        plan = launch_dispatch_plan(ids, EXPERTS, 16)
        out, z = launch_experts(*inputs, *plan, *flags)
        assert torch.equal(out, torch.zeros(tokens, 33))
        assert torch.equal(z, torch.zeros(2 * tokens, 34))
        for value, like in zip(backward(grad, inputs, z, plan, flags), inputs, strict=True):
            assert torch.equal(value, torch.zeros_like(like))


@only_triton
@pytest.mark.usefixtures("impl")
def test_bad_input_is_one_sentence():
    inputs, ids, flags, _ = made(LAYOUTS[0])
    plan = launch_dispatch_plan(ids, EXPERTS, 16)
    with pytest.raises(ToolkitError, match=r"kernels of experts, got torch\.float64"):
        launch_experts(*(None if t is None else t.double() for t in inputs), *plan, *flags)
