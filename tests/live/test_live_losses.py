"""Losses, their gradients and Adam, against float64 formulas and the unpatched model."""

import math

import pytest
import torch

from tests.helpers.live import WAIT, examples, live_engine, training
from toolkit.errors import ToolkitError
from toolkit.live.adam import AdamParams, AdamState, adam_step
from toolkit.live.losses import LOSSES, loss_named
from toolkit.testing.oracle import eager


def oracle_loss(name, lp, q, a, w, low=0.8, high=1.2, beta=0.05):
    """The loss of one token as numbers, without torch."""
    r = math.exp(lp - q)
    cut = min(max(r, low), high)
    return {
        "cross_entropy": -w * lp,
        "importance_sampling": -r * a,
        "ppo": -min(r * a, cut * a),
        "dro": -(lp * a - beta / 2 * (lp - q) ** 2),
    }[name]


def oracle_slope(name, lp, q, a, w):
    """d loss / d lp, by central differences; of cispo, whose weight has no gradient, as it is."""
    if name == "cispo":
        return -min(max(math.exp(lp - q), 0.8), 1.2) * a
    h = 1e-6
    return (oracle_loss(name, lp + h, q, a, w) - oracle_loss(name, lp - h, q, a, w)) / (2 * h)


@pytest.mark.parametrize("name", [one for one in LOSSES if one != "gspo"])  # whose tokens are not each alone
def test_losses_and_their_slopes(name):
    g = torch.Generator().manual_seed(3)
    lp = (torch.randn(40, generator=g).double() - 2).requires_grad_()
    inputs = {one: torch.randn(40, generator=g).double() for one in ("weights", "advantages")}
    inputs["logprobs"] = lp.detach() + 0.4 * torch.randn(40, generator=g).double()
    loss = loss_named(name)
    value = loss.function(lp, inputs, loss.settings(name, {}))
    (slope,) = torch.autograd.grad(value, lp)
    rows = list(zip(lp.tolist(), *(inputs[one].tolist() for one in ("logprobs", "advantages", "weights"))))
    torch.testing.assert_close(
        slope, torch.tensor([oracle_slope(name, *row) for row in rows]).double(), rtol=1e-6, atol=1e-6
    )
    if name != "cispo":
        assert float(value.detach()) == pytest.approx(sum(oracle_loss(name, *row) for row in rows), rel=1e-12)


@pytest.mark.parametrize("marked", [0, 3])
def test_gspo_clips_the_ratio_of_the_sequence(marked):
    """By its formula as numbers; with the sequence's ratio held, each token has its own log-probability's slope."""
    lp = torch.tensor([-1.0, -2.0, -0.5, -3.0], dtype=torch.float64, requires_grad=True)
    q, a = [-1.2, -1.8, 0.0, -2.9], [1.0, -2.0, 0.0, 0.5]
    mask = [1.0] * marked + [0.0] * (4 - marked)
    log_ratio = sum(one - other for one, other in zip(lp.tolist()[:marked], q)) / max(marked, 1)
    inputs = {"logprobs": q, "advantages": a, "sequence_ratio_mask": mask}
    loss = loss_named("gspo")
    given = {name: torch.tensor(one, dtype=torch.float64) for name, one in inputs.items()}
    for low, high in ((0.5, 2.0), (1.1, 2.0), (0.5, 0.7)):
        settings = loss.settings("gspo", {"clip_low_threshold": low, "clip_high_threshold": high})
        value = loss.function(lp, given, settings)
        (slope,) = torch.autograd.grad(value, lp)
        ratio = math.exp(log_ratio)
        cut = min(max(ratio, low), high)
        assert float(value.detach()) == pytest.approx(-sum(min(ratio * one, cut * one) for one in a), rel=1e-12)
        expected = [-ratio * one if ratio * one <= cut * one else 0.0 for one in a]
        assert slope.tolist() == pytest.approx(expected, rel=1e-12)


def test_settings_of_losses():
    ppo = loss_named("ppo")
    assert ppo.settings("ppo", {"clip_low_threshold": 0.5}) == {"clip_low_threshold": 0.5, "clip_high_threshold": 1.2}
    with pytest.raises(ToolkitError, match="a setting of ppo must be"):
        ppo.settings("ppo", {"beta": 1.0})
    with pytest.raises(ToolkitError, match="must be a finite number"):
        ppo.settings("ppo", {"clip_low_threshold": "x"})


def test_adam_is_torchs_in_float64():
    g = torch.Generator().manual_seed(0)
    mine = {name: torch.randn(5, 3, generator=g).double() for name in "ab"}
    theirs = {name: one.clone().requires_grad_() for name, one in mine.items()}
    settings = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-9, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(theirs.values(), **settings)
    state = AdamState()
    for _ in range(5):
        gradients = {name: torch.randn(5, 3, generator=g).double() for name in "ab"}
        for name, one in theirs.items():
            one.grad = gradients[name].clone()
        total = torch.nn.utils.clip_grad_norm_(theirs.values(), 2.0)
        optimizer.step()
        norm = adam_step(mine, gradients, state, AdamParams(1e-2, 0.8, 0.9, 1e-9, 0.1, 2.0))
        assert norm == pytest.approx(float(total), rel=1e-12)
    for name, one in theirs.items():
        torch.testing.assert_close(mine[name], one.detach(), rtol=1e-6, atol=1e-6)  # torch clips by norm + 1e-6
    with pytest.raises(ToolkitError, match="beta1 must be >= 0 and < 1, got 1"):
        AdamParams(beta1=1.0)


def test_gradients_are_those_of_the_unpatched_model_in_float64(tmp_path):
    import peft

    with live_engine() as engine, training(engine, tmp_path, micro_batch_tokens=24) as live:
        live.create("a", "base", {"rank": 4, "seed": 2}).result(WAIT)
        live.forward_backward("a", 1, examples(0, 3, 16, False), "cross_entropy", {})
        live.optim_step("a", 2, {"learning_rate": 2e-2})  # B is 0 at first
        path = live.save("a", 3, "weights", "one").result(WAIT)
        data = examples(9, 4, 16, True)
        result = live.forward_backward("a", 4, data, "importance_sampling", {}).result(WAIT)
        mine = {name: one.double() for name, one in live.tenant("a").gradients.items()}
        torch.manual_seed(0)
        from toolkit.testing.models import random_model

        adapted = peft.PeftModel.from_pretrained(
            eager(random_model("llama")).double(), str(live.checkpoints.folder(path)), is_trainable=True,
            autocast_adapter_dtype=False,
        ).double().eval()  # fmt: skip
        total = torch.zeros((), dtype=torch.float64)
        for example, logprobs in zip(data, result.logprobs):
            logits = adapted(input_ids=example.tokens[None], use_cache=False).logits[0]
            lp = logits.log_softmax(-1).gather(1, example.targets[:, None])[:, 0]
            torch.testing.assert_close(logprobs.double(), lp.detach(), rtol=1e-4, atol=1e-4)
            total = total - ((lp - example.inputs["logprobs"]).exp() * example.inputs["advantages"]).sum()
        total.backward()
        theirs = {
            name.replace(".default", ""): one.grad for name, one in adapted.named_parameters() if one.requires_grad
        }
        assert mine.keys() == theirs.keys()
        assert result.loss == pytest.approx(float(total.detach()), rel=1e-4)
        for name, one in mine.items():
            scale = float(theirs[name].abs().max())
            torch.testing.assert_close(one, theirs[name], rtol=1e-3, atol=1e-3 * scale)
