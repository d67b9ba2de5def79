"""Patching: what is claimed, that it computes the same, and that it can be taken back."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import toolkit
from toolkit.errors import ToolkitError
from toolkit.patching import find_claims, report_of
from toolkit.testing.models import FAMILIES, HYBRIDS, MOE_FAMILIES, random_model
from toolkit.testing.oracle import eager, lifted_to_double

LEFT_AND_RIGHT = ("none", "left", "right", "both")


def padded_batch(side: str, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    source = torch.Generator().manual_seed(5)
    ids = torch.randint(3, vocabulary, (3, 13), generator=source)
    mask = torch.ones_like(ids)
    if side in ("left", "both"):
        mask[0, :4] = 0
        mask[2, :1] = 0
    if side in ("right", "both"):
        mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    # What a padding row predicts is nobody's business: the first token after left padding is not a target.
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)
    return ids, None if side == "none" else mask, labels


def loss_and_gradients(model, ids, mask, labels):
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return loss.detach(), gradients


def relative(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-300))


@pytest.mark.parametrize("side", LEFT_AND_RIGHT)
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_training_step_equals_eager_float64(family, side):
    model = random_model(family).double()
    ids, mask, labels = padded_batch(side, model.config.vocab_size)
    oracle = copy.deepcopy(model)
    eager(oracle)
    with lifted_to_double():
        expected_loss, expected = loss_and_gradients(oracle, ids, mask, labels)
    toolkit.patch(model)
    # The float32 islands inside of a mixer are its own code's, patched or not.
    with lifted_to_double() if family in HYBRIDS else nullcontext():
        loss, gradients = loss_and_gradients(model, ids, mask, labels)
    assert relative(loss, expected_loss) < 1e-10
    for name, gradient in gradients.items():
        assert relative(gradient, expected[name]) < 1e-10, name


@pytest.mark.parametrize("numerics", ["bitwise", "fast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_step_equals_unpatched_float32(family, numerics):
    model = random_model(family)
    ids, mask, labels = padded_batch("right", model.config.vocab_size)
    expected_loss, expected = loss_and_gradients(copy.deepcopy(model), ids, mask, labels)
    toolkit.patch(model, numerics=numerics)
    loss, gradients = loss_and_gradients(model, ids, mask, labels)
    assert relative(loss, expected_loss) < 1e-5
    far = [name for name, gradient in gradients.items() if relative(gradient, expected[name]) >= 1e-5]
    assert not far or family in HYBRIDS, far
    if far:  # sums in a mixer cancel, in its own code: neither model is further from float64 than the other
        oracle = eager(random_model(family).double())
        with lifted_to_double():
            _, exact = loss_and_gradients(oracle, ids, mask, labels)
        for name in far:
            assert relative(gradients[name], exact[name]) < 2 * relative(expected[name], exact[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_of_the_known_families_is_claimed(family):
    report = find_claims(random_model(family))
    roles = report.roles()
    # A gated norm of two inputs is no role; its mixer keeps it as it is.
    assert {skipped.role for skipped in report.skipped} <= ({"norm"} if family in HYBRIDS else set())
    assert max(claim.error.forward for claim in report.claims) < 5e-6
    assert roles["head"] == 2
    attention = {"mamba2": 0} | dict.fromkeys(("bamba", "qwen3_next", "qwen3_next_moe", "lfm2"), 1)
    assert roles.get("attention", 0) == attention.get(family, 2)
    assert roles.get("mixer", 0) == {"mamba2": 2}.get(family, 1 if family in HYBRIDS else 0)
    assert roles["norm"] >= (3 if family == "mamba2" else 5)
    linears = {
        "gpt_neox": 8,
        "deepseek_v3": 16,
        "qwen3_next": 13,
        "mamba2": 4,
        "bamba": 12,
        "lfm2": 12,
        "phi3_longrope": 8,
    }
    linears |= {"deepseek_v3_moe": 16, "qwen3_next_moe": 15}
    assert roles["linear"] == linears.get(family, 8 if family in MOE_FAMILIES else 14)
    without = ("gpt_neox", "mamba2", "qwen3_moe", "mixtral", "olmoe", "gpt_oss")
    assert roles.get("mlp", 0) == (0 if family in without else 2)
    # The model's setting, and each layer's.
    layers = {"deepseek_v3_moe": 1}.get(family, 2) if family in MOE_FAMILIES else 0
    assert roles.get("router", 0) == layers
    assert roles.get("experts", 0) == (layers + 1 if layers else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_restores_behaviour_keys_repr_and_pickling(family):
    model = random_model(family)
    ids = torch.arange(3, 16)[None]
    before = model(ids).logits
    keys, text = list(model.state_dict()), repr(model)
    implementations = model.config._attn_implementation, model.config._experts_implementation
    toolkit.patch(model)
    assert list(model.state_dict()) == keys
    assert not torch.equal(model(ids).logits, before)
    toolkit.unpatch(model)
    assert torch.equal(model(ids).logits, before)
    assert repr(model) == text
    assert (model.config._attn_implementation, model.config._experts_implementation) == implementations
    assert report_of(model) is None
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, before)


def test_patching_twice_is_patching_once():
    model = random_model("llama")
    first = toolkit.patch(model)
    assert toolkit.patch(model) is first
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    toolkit.patch(model)
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards
    assert toolkit.patch(model, numerics="fast").numerics == "fast"
    assert "linear" not in report_of(model).roles()


def test_modules_put_in_for_patched_ones_are_patched_by_the_next_call():
    model = random_model("llama", tie_word_embeddings=False)
    first = toolkit.patch(model)
    model.resize_token_embeddings(len(model.get_input_embeddings().weight) + 8, mean_resizing=False)
    up = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = nn.Linear(up.in_features, up.out_features, bias=False)
    assert "forward" not in model.lm_head.__dict__
    again = toolkit.patch(model)
    assert again.roles() == first.roles()
    assert "forward" in model.lm_head.__dict__
    assert "forward" in model.model.layers[0].mlp.up_proj.__dict__
    assert toolkit.patch(model) is again
    copied = copy.deepcopy(model)
    assert toolkit.patch(copied) is report_of(copied)
    assert report_of(copied).claims[0].module not in set(model.modules())
    toolkit.unpatch(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_patched_copy_is_independent():
    model = random_model("llama")
    toolkit.patch(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    ids = torch.arange(3, 16)[None]
    assert not torch.equal(model(ids).logits, copied(ids).logits)
    assert copied(ids).logits.abs().max() == 0


def test_unknown_role_is_refused_with_the_nearest():
    with pytest.raises(ToolkitError, match=r"'norms'.*did you mean 'norm'"):
        toolkit.patch(random_model("llama"), roles=["norms"])


def test_a_requested_role_without_a_match_is_an_error_and_changes_nothing():
    model = random_model("gpt_neox")
    with pytest.raises(ToolkitError, match="'mlp'"):
        toolkit.patch(model, roles=["norm", "mlp"])
    assert report_of(model) is None
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_unknown_numerics_is_refused():
    with pytest.raises(ToolkitError, match="'exact'"):
        toolkit.patch(random_model("llama"), numerics="exact")


class LateNorm(nn.Module):
    """An RMS norm with its epsilon outside the square root: close to ``rms_norm``, and not it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-5

    def forward(self, hidden_states):
        return (
            self.weight * hidden_states / (hidden_states.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)
        )


def test_a_module_with_other_mathematics_is_skipped_with_the_error():
    model = random_model("llama")
    model.model.norm = LateNorm(64)
    report = toolkit.patch(model)
    skipped = next(r for r in report.skipped if r.path == "model.norm")
    assert skipped.role == "norm"
    assert "probe error" in skipped.reason
    assert "forward" not in model.model.norm.__dict__
    assert report.roles()["norm"] == 4


def test_swapped_gate_and_up_are_found_as_such():
    model = random_model("llama")
    mlp = model.model.layers[0].mlp

    class Swapped(type(mlp)):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    mlp.__class__ = Swapped
    claims = {c.path: c.op for c in find_claims(model, ["mlp"]).claims}
    assert claims["model.layers.0.mlp"] == "gated_activation (silu of up_proj)"
    assert claims["model.layers.1.mlp"] == "gated_activation (silu of gate_proj)"


def test_extra_scale_is_skipped():
    model = random_model("llama")
    mlp = model.model.layers[0].mlp

    class Scaled(type(mlp)):
        def forward(self, x):
            return 1.01 * super().forward(x)

    mlp.__class__ = Scaled
    report = toolkit.patch(model)
    assert [r.path for r in report.skipped] == ["model.layers.0.mlp"]


def test_probes_leave_random_state_and_weights_alone():
    model = random_model("qwen3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(11)
    state = torch.get_rng_state()
    toolkit.patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_generate_of_a_patched_model_gives_the_same_greedy_tokens(family):
    """Cache, padding and decoding of transformers itself go through the same kernels."""
    model = random_model(family)
    ids, mask, _ = padded_batch("left", model.config.vocab_size)
    settings = {
        "attention_mask": mask,
        "do_sample": False,
        "max_new_tokens": 9,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    expected = model.generate(ids, **settings)
    toolkit.patch(model)
    assert torch.equal(model.generate(ids, **settings), expected)


def test_sliding_window_cuts_like_eager():
    model = random_model("mistral", sliding_window=4).double()
    ids, mask, labels = padded_batch("right", model.config.vocab_size)
    oracle = copy.deepcopy(model)
    eager(oracle)
    with lifted_to_double():
        expected_loss, expected = loss_and_gradients(oracle, ids, mask, labels)
    toolkit.patch(model)
    loss, gradients = loss_and_gradients(model, ids, mask, labels)
    assert relative(loss, expected_loss) < 1e-10
    assert max(relative(gradients[name], expected[name]) for name in gradients) < 1e-10


def test_masks_with_holes_and_explicit_masks_are_honoured():
    model = random_model("llama")
    ids, _, _ = padded_batch("none", model.config.vocab_size)
    holes = torch.ones_like(ids)
    holes[0, 5] = 0
    block = torch.tril(torch.ones(13, 13, dtype=torch.bool)).expand(3, 1, 13, 13).clone()
    block[:, :, 7:, :7] = False
    keep = holes.bool()
    expected = [model(ids, attention_mask=mask).logits for mask in (holes, block)]
    toolkit.patch(model)
    got = [model(ids, attention_mask=mask).logits for mask in (holes, block)]
    assert relative(got[0][keep], expected[0][keep]) < 1e-5
    assert relative(got[1], expected[1]) < 1e-5


def test_packed_position_ids_stay_apart():
    """Positions that start over mean packed sequences to transformers; they mean it on a patched model too."""
    model = random_model("llama")
    ids = torch.arange(3, 15)[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    toolkit.patch(model)
    packed = model(ids, position_ids=positions, use_cache=False).logits[0]
    apart = torch.cat([model(ids[:, :5], use_cache=False).logits[0], model(ids[:, 5:], use_cache=False).logits[0]])
    assert relative(packed, apart) < 1e-5


def test_gradient_checkpointing_gives_the_same_gradients():
    model = random_model("llama").train()
    toolkit.patch(model)
    ids, mask, labels = padded_batch("left", model.config.vocab_size)
    _, expected = loss_and_gradients(model, ids, mask, labels)
    model.gradient_checkpointing_enable()
    _, gradients = loss_and_gradients(model, ids, mask, labels)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_loss_with_num_items_in_batch_is_the_trainers():
    model = random_model("llama")
    ids, _, labels = padded_batch("right", model.config.vocab_size)
    expected = model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    toolkit.patch(model)
    assert relative(model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss, expected) < 1e-6


def test_a_model_with_quantised_layers_is_left_as_it_was_and_refused_with_the_reason():
    """As bitsandbytes' layers on a CPU: a forward in eval mode that needs no gradient repacks the weights for good."""

    class Packed(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight = torch.nn.Parameter((linear.weight.detach() * 64).to(torch.int8), requires_grad=False)

        def forward(self, x):
            if not self.training and not x.requires_grad:
                self.weight.data = self.weight.data.flip(0)
            return torch.nn.functional.linear(x, self.weight.to(x.dtype) / 64)

    model = random_model("llama").train()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
    ids = torch.arange(3, 16)[None]
    expected, packed = model(ids).logits, [layer.self_attn.q_proj.weight.clone() for layer in model.model.layers]
    report = toolkit.patch(model)
    assert torch.is_grad_enabled()
    assert all(torch.equal(layer.self_attn.q_proj.weight, one) for layer, one in zip(model.model.layers, packed))
    assert relative(model(ids).logits, expected) < 1e-5
    assert {"norm", "mlp"} <= set(report.roles())
    with pytest.raises(ToolkitError, match=r"a skipped layer: .*parameter q_proj.weight is quantised \(int8\)"):
        toolkit.token_logprobs(model, [[3, 4, 5]])
