"""experts: outputs and every gradient against a loop over experts in float64, and bits over random schedules."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.implementations import (
    HALF,
    IMPLEMENTATIONS,
    NATIVE,
    REFERENCE,
    SMALL,
    TRITON,
    Implementation,
    impl_and,
    impl_dtype_and,
    implementations,
    only_triton,
    parameter,
)
from tests.helpers.moe import LAYERS, ROUTINGS, Layer, gradients_of, routing
from tests.helpers.rowwise import THREADS, TOLERANCE, error, seeded, threads
from toolkit.errors import ToolkitError
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.experts import experts

# In Triton's interpreter a layer takes seconds. Every layer's values and gradients are of the fast level there; of what
# else holds for all layers these are: with every score position, gated and plain, transposed and not, biased and not.
SOME = ("as gpt-oss", "at the combine", "plain, at the input")
impl_and_layer = impl_and("name", LAYERS, SOME)
kernels_and_layer = impl_and("name", LAYERS, SOME, (NATIVE, TRITON))


def every_layer_and_routing(fast):
    """By ``impl``, ``name`` and ``routed``; two routings have every sort of expert and of pair for the interpreter."""
    cases = []
    for one in IMPLEMENTATIONS:
        interpreted = SMALL and one is TRITON
        for name in LAYERS:
            for routed in ("empty experts", "skipped slots") if interpreted else ROUTINGS:
                swept = interpreted and not fast(name, routed)
                cases.append(parameter(one, name, routed, marks=[pytest.mark.sweep] if swept else []))
    return pytest.mark.parametrize(("impl", "name", "routed"), cases, indirect=["impl"])


# An output of a narrow type has passed through z, the activation and the products' outputs, each rounded to it.
NARROW = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
SCORES = 1  # among the inputs


def layer_of(name: str, impl: Implementation) -> Layer:
    """A layer by its name, with fewer columns for the interpreter."""
    layer = LAYERS[name]
    return replace(layer, width=min(layer.width, 70)) if SMALL and impl is TRITON else layer


def gradients(layer: Layer, inputs: list[Tensor], ids: Tensor, grad: Tensor, **how) -> list[Tensor]:
    """The output, then the gradient of every input."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    out = layer.run(leaves, ids, **how)
    return [out.detach(), *gradients_of(out, leaves, grad)]


def check(layer: Layer, tokens: int, routed: str, impl: Implementation, dtype: torch.dtype = torch.float32) -> None:
    inputs, ids = layer.inputs(tokens, dtype), routing(routed, tokens, layer.slots, layer.experts)
    grad = seeded(tokens, layer.width, seed=9, dtype=dtype)
    leaves = [value.double().requires_grad_() for value in inputs]
    exact = layer.oracle(leaves, ids)
    wanted = gradients_of(exact, leaves, grad.double())
    # In float32 16 roundings of the largest value: sums of these lengths in blocks lose less. Triton's are in a row.
    bound = NARROW.get(dtype, TOLERANCE[dtype] * (2 if impl is TRITON else 1))
    out, *found = gradients(layer, inputs, ids, grad, impl=impl.option)
    assert out.dtype == dtype
    assert error(out, exact.detach()) <= bound
    for at, (got, value) in enumerate(zip(found, wanted, strict=True)):
        assert got.dtype == dtype
        if at == SCORES and tokens:
            # The product of a token's gradient with an output may cancel: it is judged by the former's length.
            length = grad.double().norm(dim=-1).max().expand(1, layer.slots)
            got, value = torch.cat([got.double(), length]), torch.cat([value, length])
        assert error(got, value) <= bound


@every_layer_and_routing(lambda name, routed: name in SOME or routed == "skipped slots")
def test_outputs_and_every_gradient_match_fp64(impl, name, routed):
    for tokens in (0, 9) if SMALL and impl is TRITON else (0, 1, 5, 97):
        check(layer_of(name, impl), tokens, routed, impl)


@impl_dtype_and("name", LAYERS, SOME, [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(impl, dtype, name):
    check(layer_of(name, impl), 9 if SMALL and impl is TRITON else 41, "skipped slots", impl, dtype)


@implementations(REFERENCE, NATIVE)
@pytest.mark.parametrize("routed", ROUTINGS)
@pytest.mark.parametrize("name", ["halves", "as gpt-oss", "at the input"])
def test_a_thousand_tokens(impl, routed, name):
    check(layer_of(name, impl), 1000, routed, impl)


@implementations(REFERENCE, NATIVE)
def test_more_tokens_than_four_thousand(impl):
    check(Layer(width=16, inner=8, biases=True), 4097, "skewed", impl)


@impl_and_layer
def test_bits_of_a_token_do_not_depend_on_other_tokens(impl, name):
    """The same token, experts and scores: any index, any number of tokens, any others, 1 or 2 threads."""
    few = SMALL and impl is TRITON
    layer, rng = layer_of(name, impl), random.Random(0)
    count = 30 if few else 450
    x, scores, *weights = layer.inputs(count)
    ids = routing("skipped slots" if layer.slots > 1 else "uniform", count, layer.slots, layer.experts, 3)
    own = 4
    assert bool((ids[own] < layer.experts).any())
    alone = layer.run([x[own : own + 1], scores[own : own + 1], *weights], ids[own : own + 1], impl.option)
    for trial in range(3 if few else 12):
        tokens = rng.choice([1, 2, 3, 7, 30, 200, 450][: 5 if few else 7])
        index = rng.randrange(tokens)
        others = torch.randint(count, (tokens,))
        others[index] = own
        with threads(THREADS[trial % len(THREADS)]):
            routed = (
                ids[others] if trial % 3 else routing(rng.choice(ROUTINGS), tokens, layer.slots, layer.experts, trial)
            )
            routed[index] = ids[own]
            out = layer.run([x[others], scores[others], *weights], routed, impl.option)
        assert torch.equal(out[index], alone[0]), (trial, tokens, index)


@every_layer_and_routing(lambda name, routed: name in SOME and routed == "skipped slots")
def test_a_prefill_has_the_bits_of_its_decodes(impl, name, routed):
    layer, tokens = layer_of(name, impl), 4 if SMALL and impl is TRITON else 23
    x, scores, *weights = layer.inputs(tokens)
    ids = routing(routed, tokens, layer.slots, layer.experts)
    whole = layer.run([x, scores, *weights], ids, impl.option)
    steps = [layer.run([x[t : t + 1], scores[t : t + 1], *weights], ids[t : t + 1], impl.option) for t in range(tokens)]
    assert torch.equal(whole, torch.cat(steps))


@kernels_and_layer  # torch chooses the order of the reference's sums
def test_gradients_have_the_same_bits_on_every_run_and_any_threads(impl, name):
    """And those of a token's x and scores do not depend on the other tokens."""
    layer, tokens = layer_of(name, impl), 9 if SMALL and impl is TRITON else 600
    inputs, grad = layer.inputs(tokens), seeded(tokens, layer.width, seed=9, dtype=torch.float32)
    ids = routing("skewed", tokens, layer.slots, layer.experts)
    with threads(1):
        first = gradients(layer, inputs, ids, grad)
    for n in THREADS:
        with threads(n):
            assert all(torch.equal(*pair) for pair in zip(first, gradients(layer, inputs, ids, grad)))
    some = torch.randperm(tokens)[: tokens // 2]
    part = gradients(layer, [inputs[0][some], inputs[1][some], *inputs[2:]], ids[some], grad[some])
    for got, whole in zip(part[:3], first[:3]):
        assert torch.equal(got, whole[some])


@impl_dtype_and("name", LAYERS, SOME, [torch.float32, torch.float16], (NATIVE, TRITON))
def test_recomputed_gradients_have_the_same_bits(impl, name, dtype):
    layer, tokens = layer_of(name, impl), 9 if SMALL and impl is TRITON else 60
    inputs, grad = layer.inputs(tokens, dtype), seeded(tokens, layer.width, seed=9, dtype=dtype)
    ids = routing("skipped slots", tokens, layer.slots, layer.experts)
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


def test_only_the_gradients_asked_for_and_experts_without_rows(impl):
    layer = LAYERS["biases"]
    ids = torch.tensor([[1, 3], [3, 1], [1, 5]])
    full = gradients(layer, layer.inputs(3), ids, torch.ones(3, layer.width), impl=impl.option)[1:]
    for value in full[2:]:
        assert not value[[0, 2, 4]].any()
        assert value[[1, 3]].flatten(1).any(1).all()
    for wanted in (1, 2, 12, 21, 42, 48) if SMALL and impl is TRITON else range(1, 64):
        leaves = [leaf.requires_grad_(bool(wanted >> i & 1)) for i, leaf in enumerate(layer.inputs(3))]
        layer.run(leaves, ids, impl.option).sum().backward()
        for i, (leaf, value) in enumerate(zip(leaves, full)):
            assert (leaf.grad is not None) == bool(wanted >> i & 1)
            assert leaf.grad is None or error(leaf.grad, value) <= TOLERANCE[torch.float32]


@impl_and_layer
def test_strides_do_not_change_bits(impl, name):
    layer, tokens = layer_of(name, impl), 5 if SMALL and impl is TRITON else 20
    inputs, ids = layer.inputs(tokens), routing("uniform", tokens, layer.slots, layer.experts)
    grad = seeded(tokens, layer.width, seed=9, dtype=torch.float32)
    strided = [torch.stack([value, -value], -1)[..., 0] for value in inputs]
    by_column = [value.mT.contiguous().mT for value in inputs]
    dense = gradients(layer, inputs, ids, grad, impl=impl.option)
    for views in (strided, by_column):
        assert torch.equal(layer.run(views, ids, impl.option), dense[0])
        leaves = [value.requires_grad_() for value in views]
        cotangent = torch.stack([grad, grad], -1)[..., 0]
        for got, wanted in zip(torch.autograd.grad(layer.run(leaves, ids, impl.option), leaves, cotangent), dense[1:]):
            assert error(got, wanted) <= (0 if impl is NATIVE else TOLERANCE[torch.float32])


@impl_and_layer
def test_nan_stays_with_its_token_and_its_expert(impl, name):
    layer, tokens = layer_of(name, impl), 12 if SMALL and impl is TRITON else 60
    x, scores, up, *rest = layer.inputs(tokens)
    ids = routing("skipped slots", tokens, layer.slots, layer.experts)
    clean = layer.run([x, scores, up, *rest], ids, impl.option)
    x[7], scores[ids == layer.experts], up[0] = float("nan"), float("nan"), float("nan")
    out = layer.run([x, scores, up, *rest], ids, impl.option)
    dirty = (ids == 0).any(-1)
    dirty[7] = bool((ids[7] < layer.experts).any())
    assert torch.equal(out[~dirty], clean[~dirty])
    assert bool(out[dirty].isnan().all())


def test_tokens_without_experts_and_scores_of_zero(impl):
    layer = LAYERS["biases"]
    inputs = layer.inputs(6)
    for tokens in (0, 6):
        some = [inputs[0][:tokens], inputs[1][:tokens], *inputs[2:]]
        grad = torch.ones(tokens, layer.width)
        found = gradients(layer, some, torch.full((tokens, 2), 5), grad, impl=impl.option)
        assert not any(value.any() for value in found)
    inputs[1].zero_()
    assert not layer.run(inputs, routing("uniform", 6, 2, 5), impl.option).any()


def test_scores_may_be_wider_than_the_rest(impl):
    layer = LAYERS["biases"]
    inputs, ids = layer.inputs(30, HALF), routing("uniform", 30, 2, 5)
    inputs[1] = layer.inputs(30)[1].requires_grad_()
    out = layer.run(inputs, ids, impl.option)
    out.sum().backward()
    assert (out.dtype, inputs[1].grad.dtype) == (HALF, torch.float32)
    assert error(out.detach(), layer.oracle([value.detach().double() for value in inputs], ids)) <= NARROW[out.dtype]


def test_wrong_arguments_are_one_sentence():
    layer = LAYERS["biases"]
    x, scores, up, down, _, down_bias = layer.inputs(4)
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


@implementations(NATIVE)
@pytest.mark.usefixtures("impl")
def test_the_native_kernel_checks_what_it_is_given():
    layer = LAYERS["biases"]
    x, scores, up, down, up_bias, down_bias = layer.inputs(4)
    plan = dispatch_plan(routing("uniform", 4, 2, 5), 5)
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


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.sweep) for name in LAYERS]
)
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


# The Triton launcher: what it shares with the backward, and its limits.
@impl_and("name", LAYERS, SOME, [TRITON])
@pytest.mark.usefixtures("impl")
def test_the_pre_activation_is_the_grouped_product_to_the_bit(name):
    """What a backward that takes the first product again relies on."""
    from toolkit.ops.experts.triton import input_rows

    layer = LAYERS[name]
    x, scores, up, down, *biases = layer.inputs(9)
    up_bias, down_bias = biases or (None, None)
    plan = dispatch_plan(routing("skipped slots", 9, layer.slots, layer.experts), layer.experts, 16)
    flags = layer.activation, layer.score_position, layer.transposed, layer.interleaved
    z = torch.ops.toolkit.experts(x, scores, up, up_bias, down, down_bias, *plan, *flags)[1]
    source, gather = input_rows(x, scores, *plan[:3], layer.score_position), layer.score_position != "input"
    assert torch.equal(z, torch.ops.toolkit.grouped_linear(source, up, up_bias, *plan, gather, layer.transposed))
    assert not z[int(plan[2][-1]) :].any()
    for tile in (5, 40):
        other = dispatch_plan(routing("skipped slots", 9, layer.slots, layer.experts), layer.experts, tile)
        again = torch.ops.toolkit.experts(x, scores, up, up_bias, down, down_bias, *other, *flags)[1]
        assert torch.equal(again, z)


@only_triton
@pytest.mark.usefixtures("impl")
def test_a_dtype_that_is_named():
    layer = LAYERS["halves"]
    with pytest.raises(ToolkitError, match=r"kernels of experts, got torch\.float64"):
        layer.run(layer.inputs(4, torch.float64), routing("uniform", 4, 2, 5))
