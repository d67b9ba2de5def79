"""Mixers with separate decays for keys: selective scans of channels and Kimi delta attention, against stock models."""

import copy

import pytest
import torch

import toolkit
from toolkit.patching.logprobs import token_logprobs
from toolkit.patching.roles import mixer
from toolkit.state.active import set_forward_context
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext
from toolkit.testing.architectures import small_model
from toolkit.testing.oracle import eager, lifted_to_double
from toolkit.testing.parity import check_parity

SCANS = "convolution + selective scan"
# (model type, what its mixers are, settings): a selective scan, one with norms on what it selects by, beside attention
# and experts, one in heads beside shared attention that is called with its index; gates for each key.
FAMILIES = [
    ("mamba", SCANS, {}),
    pytest.param("falcon_mamba", SCANS, {}, marks=pytest.mark.sweep),
    pytest.param("jamba", SCANS, {"attn_layer_period": 2, "attn_layer_offset": 1}, marks=pytest.mark.sweep),
    ("zamba", SCANS, {}),
    ("kimi_linear", "convolution + gated delta rule", {}),
    pytest.param("bailing_hybrid", "convolution + gated delta rule", {}, marks=pytest.mark.sweep),
]
SEQUENCES = [torch.arange(5, 5 + count) * 7 % 97 for count in (4, 11)]


def stock_logprobs(model, sequence):
    logits = model(sequence[None], use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, sequence[1:, None])[:, 0]


@pytest.mark.parametrize(("name", "op", "settings"), FAMILIES)
def test_a_ragged_batch_is_the_stock_model_of_each_sequence(name, op, settings):
    """Log-probabilities and all gradients; then the engine's are training's, bit for bit, and unpatching restores."""
    model = small_model(name, **settings).eval()
    expected = torch.cat([stock_logprobs(model, sequence) for sequence in SEQUENCES])
    weights = torch.linspace(-1, 1, len(expected))
    parameters, stock = list(model.parameters()), copy.deepcopy(model)
    wanted = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)
    report = toolkit.patch(model)
    assert op in {claim.op for claim in report.claims if claim.role == "mixer"}
    assert not [one for one in report.skipped if one.role in ("attention", "mixer")]
    got = torch.cat(token_logprobs(model, SEQUENCES))
    with lifted_to_double():
        exact = torch.cat([stock_logprobs(eager(copy.deepcopy(stock).double()), sequence) for sequence in SEQUENCES])
    # As near to the truth as the stock model: Zamba's own float32 is 6e-4 away from it.
    assert float((got - exact).detach().abs().max()) <= 1.5 * float((expected - exact).detach().abs().max()) + 1e-5
    largest = max(float(one.norm()) for one in wanted if one is not None)
    for one, other in zip(torch.autograd.grad((got * weights).sum(), parameters, allow_unused=True), wanted):
        if other is not None:
            assert float((one - other).norm()) <= 1e-4 * max(float(other.norm()), 1e-2 * largest)
    prompts = [list(range(3, 40)), [3, 1, 2], [7] * 20]
    parity = check_parity(model, prompts, min_tokens=60, max_new_tokens=12)
    assert parity.differing == parity.replayed_differing == 0
    assert parity.prefix_cache_hits > 0
    assert parity.num_preemptions > 0
    toolkit.unpatch(model)
    again = torch.cat([stock_logprobs(model, sequence) for sequence in SEQUENCES])
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_an_index_that_is_none_is_none_again():
    model = small_model("zamba").eval()
    layers = [module for module in model.modules() if hasattr(module, "is_causal")]
    assert [layer.layer_idx for layer in layers] == [None, None]
    toolkit.patch(model, roles=["attention"])
    assert [layer.layer_idx for layer in layers] == [1, 3]
    assert [layer.layer_idx for layer in copy.deepcopy(model).modules() if hasattr(layer, "is_causal")] == [1, 3]
    toolkit.unpatch(model)
    assert [layer.layer_idx for layer in layers] == [None, None]


def test_a_positional_mask_is_cleared_in_a_ragged_batch():
    """As a named one is: there is no padding between sequences."""

    def forward(self, hidden_states, cache_params=None, attention_mask=None):
        return hidden_states, cache_params, attention_mask

    replaced = mixer.substituted(forward, {})
    assert replaced(None, 1, 2, 3) == (1, 2, 3)
    with set_forward_context(DenseContext(RaggedBatch.from_sequences([[5]]))):
        assert replaced(None, 1, 2, 3) == (1, 2, None)
        assert replaced(None, 1, attention_mask=3) == (1, None, None)
        assert replaced(None, 1) == (1, None, None)
