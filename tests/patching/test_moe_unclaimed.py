"""Routers and experts that no role claims: batch-invariant, and no captured graph that bakes them in."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toolkit
from toolkit.engine.step.decode_graphs import DecodeGraphs
from toolkit.engine.step.graph import capture
from toolkit.modules.elementwise import row_invariant
from toolkit.testing.models import random_model
from toolkit.testing.parity import check_parity

PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [21], [5, 4, 3]]


class Mlp(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down_proj, self.act_fn = nn.Linear(inner, hidden, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ListedExperts(nn.Module):
    """Experts as older models keep them: modules in a list, routed by a linear layer in the block's own forward."""

    def __init__(self, hidden, count, k):
        super().__init__()
        self.k, self.gate = k, nn.Linear(hidden, count, bias=False)
        self.experts = nn.ModuleList([Mlp(hidden, 24) for _ in range(count)])
        self.shared, self.shared_gate = Mlp(hidden, 24), nn.Linear(hidden, 1, bias=False)

    def forward(self, hidden):
        x = hidden.reshape(-1, hidden.shape[-1])
        scores, ids = torch.topk(F.softmax(self.gate(x), dim=1, dtype=torch.float), self.k, dim=-1)
        scores = scores / scores.sum(-1, keepdim=True)
        out = F.sigmoid(self.shared_gate(x)) * self.shared(x)
        mask = F.one_hot(ids, len(self.experts)).permute(2, 1, 0)
        for index, expert in enumerate(self.experts):
            slot, token = torch.where(mask[index])
            out.index_add_(0, token, expert(x[token]) * scores[token, slot, None])
        return out.view(hidden.shape)


def listed():
    model = random_model("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for layer in model.model.layers:
            layer.mlp = ListedExperts(64, 6, 2)
    return model.eval()


def other_limits():
    model = random_model("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.experts.limit = 3.0
    return model


def own_router():
    """A router that the role refuses: its choice is made of rounded logits."""
    model = random_model("qwen3_moe")

    class Rounded(type(model.model.layers[0].mlp.gate)):
        def forward(self, hidden_states):
            logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
            _, ids = logits.mul(2).round().topk(self.top_k, dim=-1)
            return logits, logits.gather(-1, ids).sigmoid(), ids

    for layer in model.model.layers:
        layer.mlp.gate.__class__ = Rounded
    return model


@pytest.mark.parametrize("make", [listed, other_limits, own_router])
def test_no_token_differs_where_experts_or_routers_are_skipped(make):
    model = make()
    toolkit.patch(model)
    parity = check_parity(model, PROMPTS, min_tokens=400, seed=2, max_new_tokens=12)
    assert parity.tokens >= 400
    assert parity.differing == 0


def test_experts_in_a_list_are_gated_mlps():
    report = toolkit.patch(listed())
    mlps = [claim.path for claim in report.claims if claim.role == "mlp"]
    assert sum(".experts." in path for path in mlps) == 12
    assert "experts" not in report.roles()


@pytest.mark.parametrize(("make", "captured"), [(listed, False), (other_limits, False), (own_router, True)])
def test_forwards_that_look_at_values_have_no_graphs(make, captured, monkeypatch):
    made = []
    original = DecodeGraphs.__init__

    def noted(self, model, **settings):
        original(self, model, **settings)
        made.append(self)

    monkeypatch.setattr(DecodeGraphs, "__init__", noted)
    with toolkit.Engine(make()) as engine:
        engine.generate(PROMPTS, toolkit.SamplingParams(max_tokens=6, seed=1, ignore_eos=True))
    (graphs,) = made
    assert bool(graphs._graphs) is captured
    assert bool(graphs.data_dependent_op) is not captured


WEIGHT = torch.randn(3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * sum(x.tolist()),
        lambda x: x * float(x[0]),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0],
        lambda x: x * float(x.numpy()[0]),
        lambda x: x * x.nonzero().shape[0],
        lambda x: torch.repeat_interleave(x, (x > 1).long() + 1),
        lambda x: x * int(x[1].int()),
        lambda x: x if torch.equal(x, WEIGHT) else -x,
        lambda x: x * next(float(value) for value in x.clone().add_(1)),
    ],
)
def test_a_recording_says_that_values_decided_what_it_holds(function):
    assert capture(function, [torch.tensor([1.0, 2.0, 3.0])]).data_dependent_op


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * WEIGHT[0].item(),
        lambda x: x[torch.tensor([1, 0])],
        lambda x: x if bool((WEIGHT > 9).any()) else x * 2,
        lambda x: torch.where(x > 1, x, WEIGHT).sort().values,
        lambda x: x * x.shape[0],
    ],
)
def test_constants_and_shapes_may_be_looked_at(function):
    assert capture(function, [torch.tensor([1.0, 2.0, 3.0])]).data_dependent_op == ""


def test_topk_takes_the_lowest_index_of_equal_values_with_gradients():
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    with row_invariant():
        values, ids = torch.topk(x, 2, dim=-1)
        again = x.topk(4, -1, sorted=False).indices
    assert ids.tolist() == [[1, 2], [0, 1]]
    assert again.tolist() == [[1, 2, 4, 3], [0, 1, 2, 3]]
    values.sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    with row_invariant():  # of another dimension, or the least, torch's own
        assert torch.equal(torch.topk(x, 1, dim=0).values, x.detach()[:1].clamp_min(0))
        assert torch.topk(x, 1, largest=False).values[0, 0] == 1.0


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: F.linear(x, w, b),
        lambda x, w, b: F.linear(x, w),
        lambda x, w, b: x @ w.t(),
        lambda x, w, b: torch.matmul(x, w.t().contiguous()) + b,
        lambda x, w, b: F.softmax(F.linear(x, w), dim=-1, dtype=torch.float),
        lambda x, w, b: F.linear(x, w).softmax(-1).sum(-1, keepdim=True),
        lambda x, w, b: F.linear(x, w).logsumexp(-1),
        lambda x, w, b: torch.bmm(x[None], nn.Parameter(w.t()[None].contiguous()))[0],
    ],
)
def test_a_models_own_matmuls_are_batch_invariant(function):
    source = torch.Generator().manual_seed(1)
    for rows, depth, outputs in ((37, 64, 12), (130, 129, 7), (3, 300, 128)):
        x, w = torch.randn(rows, depth, generator=source), torch.randn(outputs, depth, generator=source)
        b = torch.randn(outputs, generator=source)
        with row_invariant():
            whole = function(x, w, b)
            for _ in range(8):
                chosen = torch.randperm(rows, generator=source)[: int(torch.randint(1, rows + 1, (), generator=source))]
                assert torch.equal(function(x[chosen], w, b), whole[chosen])
        torch.testing.assert_close(whole, function(x.double(), w.double(), b.double()).float(), rtol=1e-4, atol=1e-4)
