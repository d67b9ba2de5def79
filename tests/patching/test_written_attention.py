"""Attention that layers write out: what is recognised, what is refused, and models whose layers do so."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.modules.attention_scores import UnknownStep
from toolkit.modules.written_attention import BatchWatch, Plan, written_forward
from toolkit.patching import find_claims, patch, ragged_forward
from toolkit.patching.ragged_call import MASKS_OF_BATCH
from toolkit.patching.written_trace import TraceWatch
from toolkit.state.active import set_forward_context
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext
from toolkit.testing.architectures import small_model
from toolkit.testing.coverage.causal import measure

N, D, T = 4, 8, 11
SLOPES = (0.5, 0.25, 0.125, 0.0625)
LOWEST = torch.finfo(torch.float32).min


def _mask(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def _additive(length: int) -> Tensor:
    return torch.zeros(length, length).masked_fill(~_mask(length), LOWEST)


def plain(q, k, v):
    scores = q @ k.transpose(-1, -2)
    scores /= math.sqrt(q.shape[-1])
    return F.softmax(scores + _additive(q.shape[-2]), dim=-1, dtype=torch.float32).to(v.dtype) @ v


def flat(q, k, v):
    """Heads in the first dimension, sizes checked, floored, dropped out."""
    length = q.shape[-2]
    q, k, v = (x.reshape(-1, length, x.shape[-1]) for x in (q * q.shape[-1] ** -0.5, k, v))
    scores = torch.bmm(q, k.transpose(1, 2))
    assert (scores.size(), scores.size(-1), scores.dim()) == ((N, length, length), length, 3)
    scores = scores.view(1, N, length, -1) + _additive(length)[None, None]
    scores = torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min))
    weights = F.dropout(scores.view(N, length, length).softmax(-1), 0.5, training=False)
    return torch.bmm(weights, v)[None]


def alibi(q, k, v):
    length = q.shape[-2]
    bias = (torch.tensor(SLOPES)[:, None] * torch.arange(length))[:, None]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = bias.baddbmm(batch1=q, batch2=k.mT, beta=1.0, alpha=0.25).view(1, N, length, length)
    return torch.bmm((scores + _additive(length)).softmax(-1).view(N, length, length), v)[None]


def window(q, k, v):
    length = q.shape[-2]
    seen = torch.bitwise_xor(_mask(64), _mask(64).tril(-3))[:length, :length]
    scores = torch.where(seen, torch.matmul(q.float(), k.mT.float()), torch.tensor(LOWEST))
    return torch.matmul(torch.nn.Softmax(-1)(scores), v)


def chunks(q, k, v):
    at = torch.arange(q.shape[-2])
    seen = (at[:, None] // 3 == at // 3) & (at[:, None] >= at)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None])


def multiplied_mask(q, k, v):
    seen = _mask(q.shape[-2]).float()
    return F.softmax(torch.matmul(q, k.mT) / 2.0 * seen + -1e4 * (1 - seen), dim=-1).matmul(v)


def in_place(q, k, v):
    scores = torch.matmul(q, k.mT)
    scores.masked_fill_(~_mask(q.shape[-2]).expand_as(scores), -torch.inf)
    return scores.float().softmax(dim=-1).type_as(v) @ v


def shared_key(q, k, v):
    """One head of keys for all heads of queries."""
    return plain(q, k[:, :1], v[:, :1])


def repeated_keys(q, k, v):
    k, v = (x[:, :2, None].expand(1, 2, 2, *x.shape[2:]).reshape(q.shape) for x in (k, v))
    return plain(q, k, v)


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], is_causal=True, scale=0.5, enable_gqa=True)


FORMS = {
    plain: Plan(D**-0.5, 0, None, N),
    flat: Plan(1.0, 0, None, N),
    alibi: Plan(0.25, 0, SLOPES, N),
    window: Plan(1.0, 3, None, N),
    chunks: Plan(D**-0.5, 3, None, N, chunked=True),
    multiplied_mask: Plan(0.5, 0, None, N),
    in_place: Plan(1.0, 0, None, N),
    shared_key: Plan(D**-0.5, 0, None, 1),
    repeated_keys: Plan(D**-0.5, 0, None, 2),
    fused: Plan(0.5, 0, None, 2),
}


def _inputs(length: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(length)
    return [torch.randn(1, N, length, D, generator=source, requires_grad=True) for _ in range(3)]


def _plan(form) -> Plan:
    with torch.no_grad(), TraceWatch(T) as watch:
        form(*_inputs(T))
    (trace,) = watch.traces
    return trace.plan()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_plan_says_what_the_code_does(form):
    expected, plan = FORMS[form], _plan(form)
    assert plan.scale == pytest.approx(expected.scale, rel=1e-6)
    assert replace(plan, scale=expected.scale) == expected


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_batch_is_its_sequences_one_by_one(form):
    parts = [_inputs(length) for length in (5, 8)]
    expected = torch.cat([form(*part) for part in parts], -2)
    context = DenseContext(RaggedBatch.from_sequences([[0] * 5, [0] * 8], share=False))
    with BatchWatch(context, 0, [_plan(form)]):
        got = form(*(torch.cat(pair, -2) for pair in zip(*parts)))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    leaves = [x for part in parts for x in part]
    for one, other in zip(*(torch.autograd.grad(out, leaves, cotangent, retain_graph=True) for out in (got, expected))):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _two_masks(q, k, v):
    return (q @ k.mT + torch.stack([_additive(T)] * 3 + [torch.zeros(T, T)])).softmax(-1) @ v


REFUSED = {
    "different masks": _two_masks,
    "neither causal": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "not ALiBi": lambda q, k, v: (q @ k.mT + _additive(T) - torch.arange(T).float().sqrt()).softmax(-1) @ v,
    "a factor that is not the same": lambda q, k, v: (
        (q @ k.mT * (1.0 + torch.arange(T)) + _additive(T)).softmax(-1) @ v
    ),
    "after the softmax": lambda q, k, v: ((q @ k.mT + _additive(T)).softmax(-1) * 0.5) @ v,
    "go through tanh": lambda q, k, v: (torch.tanh(q @ k.mT) + _additive(T)).softmax(-1) @ v,
    "go through square": lambda q, k, v: ((q @ k.mT).square() + _additive(T)).softmax(-1) @ v,
    "bounded below": lambda q, k, v: ((q @ k.mT).clamp_min(-1.0) + _additive(T)).softmax(-1) @ v,
    "not over the keys": lambda q, k, v: (q @ k.mT + _additive(T)).softmax(-2) @ v,
    "change their sign": lambda q, k, v: (_additive(T) - q @ k.mT).softmax(-1) @ v,
    "something else than values": lambda q, k, v: (q @ k.mT + _additive(T)) @ v,
}


@pytest.mark.parametrize("why", REFUSED)
def test_other_steps_are_refused(why):
    with pytest.raises(UnknownStep, match=why):
        _plan(REFUSED[why])


@pytest.mark.parametrize(
    ("form", "plans", "why"),
    [
        (plain, 2, "Module must attend 2 times in a ragged batch of 11 tokens, as when it was patched, got 1"),
        (plain, 0, "something else in a batch of 11 tokens than when it was patched: it attends more often than 0"),
        (REFUSED["go through tanh"], 1, "attention of Module does something else .*: its scores go through tanh"),
    ],
)
def test_a_layer_that_attends_otherwise_than_its_plans_is_an_error(form, plans, why):
    forward = written_forward(lambda self, *inputs: form(*inputs), 0, [FORMS[plain]] * plans)
    context = DenseContext(RaggedBatch.from_sequences([[0] * T], share=False))
    with set_forward_context(context), pytest.raises(ToolkitError, match=why):
        forward(nn.Module(), *_inputs(T))


def test_claims_of_a_model_and_undo():
    model = small_model("gpt_neo")
    before = dict(model.transformer.h[1].attn.attention.__dict__)
    report = find_claims(model, ["attention"])
    assert [claim.op for claim in report.claims] == [
        MASKS_OF_BATCH, "attention (its own forward, causal)", "attention (its own forward, window)"
    ]  # fmt: skip
    assert model.transformer.h[1].attn.attention.__dict__.keys() == before.keys()


def test_an_ordinary_call_keeps_its_masks_and_padding():
    model = small_model("mpt")
    ids, mask = torch.randint(5, 300, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        patch(model)
        got = model(ids, attention_mask=mask).logits
        ragged_forward(model, RaggedBatch.from_sequences([[5, 6, 7]]))
        again = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    assert torch.equal(got, again)


def _skipped(model) -> set[str]:
    return {one.reason for one in find_claims(model).skipped if one.role == "attention"}


def test_a_cache_that_forgets_what_the_masks_show_is_a_reason():
    assert any("its cache keeps" in reason for reason in _skipped(small_model("moshi")))


def test_a_bias_that_is_rounded_far_away_is_a_reason():
    """Falcon's, in bfloat16: beyond 256 tokens its steps are not equal."""
    assert any("not ALiBi" in reason for reason in _skipped(small_model("falcon", alibi=True, num_kv_heads=4)))


def test_a_model_that_a_short_forward_changes_stays_as_it_is():
    model = small_model("big_bird", attention_type="block_sparse")
    before = {path: type(module) for path, module in model.named_modules()}
    assert _skipped(model) == {"a short forward replaces its children"}
    assert {path: type(module) for path, module in model.named_modules()} == before


@pytest.mark.parametrize("model_type", ["mpt"])
def test_a_family_is_covered(model_type):
    row = measure(model_type)
    assert row.verdict == "covered", (row.reason, row)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("falcon", {"multi_query": False, "num_kv_heads": 4}),
        ("falcon", {"multi_query": True, "parallel_attn": False}),
    ],
)
def test_variants(model_type, settings):
    row = measure(model_type, **settings)
    assert row.verdict == "covered", (row.reason, row)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "model_type",
    [
        "bloom", "falcon", "gptj", "codegen", "gpt_neo", "gpt_neox_japanese", "xglm", "megatron-bert", "rembert",
        "roformer", "mvp", "trocr", "ctrl", "openai-gpt", "big_bird", "bigbird_pegasus", "diffllama", "got_ocr2",
        "llama4",
    ],
)  # fmt: skip
def test_families_are_covered(model_type):
    row = measure(model_type)
    assert row.verdict == "covered", (row.reason, row)
