"""An architecture written after the patches is patched; a part of it that computes something else is skipped."""

import pytest
import torch

import toolkit
from tests.helpers.late_family import CHANGES, sapling
from toolkit.testing.oracle import eager

WHOLE = {
    "norm": 5,
    "rotary": 1,
    "mlp": 2,
    "activation": 2,
    "attention": 2,
    "layer": 2,
    "linear": 14,
    "head": 2,
}
# What a change takes out of the claims, and where the report says why.
LESS = {
    "late_eps": ({"norm": 0}, "norm", "it is not rms_norm"),
    "scaled_mlp": ({"mlp": 0}, "mlp", "it is not gated_activation (silu of gate_proj)"),
    "late_tables": ({"rotary": 0}, "rotary", "it is not rotary_tables"),
    "smoothed_loss": ({"head": 1}, "head", "its loss is not causal_lm_loss"),
    "paired_output": ({"mlp": 0}, "mlp", "it is not gated_activation"),
}
# The fused forward of attention is an offer on top of the interface: without it attention is served all the same. (The
# second change is the same mathematics, handed over in another form.)
NOT_FUSED = ("scaled_queries", "single_output")


def step(model, ids):
    model.zero_grad(set_to_none=True)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("change", ["", *CHANGES])
def test_what_is_proven_is_patched_and_nothing_else(change):
    model = sapling(change)
    ids = torch.randint(3, 331, (2, 17), generator=torch.Generator().manual_seed(1))
    expected_loss, expected = step(eager(sapling(change)), ids)
    written = model.generate(ids[:1], max_new_tokens=12, do_sample=False, eos_token_id=None)
    report = toolkit.patch(model)
    less, role, reason = LESS.get(change, ({}, None, None))
    wanted = {name: count for name, count in (WHOLE | less).items() if count}
    assert report.roles() == wanted
    attention = "attention interface" if change in NOT_FUSED else "attention (fused, half rotary)"
    assert {one.op for one in report.claims if one.role == "attention"} == {attention}
    if role is None:
        assert report.skipped == []
    else:
        assert {one.role for one in report.skipped} == {role}
        assert all(one.reason.startswith(reason) and "probe error" in one.reason for one in report.skipped)
    if change == "swapped":  # found for what it is
        assert {one.op for one in report.claims if one.role == "mlp"} == {"gated_activation (silu of up_proj)"}
    loss, gradients = step(model, ids)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        # Of a key's bias the gradient is 0 but for roundings.
        assert error < 1e-5 or expected[name].norm() < 1e-4 * expected["fruit.weight"].norm(), name
    with toolkit.Engine(model, num_blocks=16) as engine:
        params = toolkit.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        (completion,) = engine.generate([ids[0].tolist()], params)
    assert completion.token_ids == written[0, 17:].tolist()
    again = toolkit.token_logprobs(model, [ids[0].tolist() + completion.token_ids])[0]
    # Skipped parts are not promised to be bitwise identical; but these are elementwise, and sums over a row.
    torch.testing.assert_close(again[16:].tolist(), completion.logprobs, rtol=1e-5, atol=1e-5)
    if not change:
        assert again[16:].tolist() == completion.logprobs
