"""torch.compile through a patched model: one graph, forward and backward, made of the registered ops."""

from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import toolkit
from toolkit.patching import ragged_forward
from toolkit.state import RaggedBatch
from toolkit.testing.models import random_model
from toolkit.training.losses import next_token_loss


@pytest.fixture
def llama():
    model = random_model("llama", layers=1).train()
    toolkit.patch(model)
    yield model
    torch._dynamo.reset()


def step(model, function, ids):
    for parameter in model.parameters():
        parameter.grad = None
    loss = function(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def ids_of(model, rows: int = 2, length: int = 19):
    return torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def assert_same(got, wanted):
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=1e-6)
    for name, gradient in wanted[1].items():
        assert (got[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def compiled(function, graphs: list[Counter], dynamic: bool | None = None):
    """``function`` as one graph forward and one backward, run as they are; the ops in each go to ``graphs``."""

    def collect(graph, _):
        graphs.append(Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=collect, bw_compiler=collect)
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


def assert_ops(model, graphs: list[Counter], with_attention: bool):
    forward, backward = graphs
    layers = model.config.num_hidden_layers
    both = {"rms_norm": 2 * layers + 1, "gated_activation": layers, "attention": layers if with_attention else 0}
    for op, count in (both | {"rotary": 2 * layers, "linear": 7 * layers + 1, "token_logprob": 1}).items():
        assert forward[f"toolkit.{op}.default"] == count, op
    for op, count in both.items():
        assert backward[f"toolkit.{op}_backward.default"] == count, op


def test_a_ragged_batch_is_one_graph_each_way(llama):
    graphs: list[Counter] = []

    def loss(batch, targets):
        return next_token_loss(ragged_forward(llama, batch), targets)

    function = compiled(loss, graphs)
    for seed, lengths in enumerate(([7, 1, 12], [3, 9, 5, 2], [4])):
        generator = torch.Generator().manual_seed(seed)
        sequences = [torch.randint(331, (n + 1,), generator=generator) for n in lengths]
        batch = RaggedBatch.from_sequences([sequence[:-1] for sequence in sequences])
        targets = torch.cat([sequence[1:] for sequence in sequences])
        results = []
        for f in (function, loss):
            llama.zero_grad()
            value = f(batch, targets)
            value.backward()
            results.append((value.detach(), {name: p.grad for name, p in llama.named_parameters()}))
        assert_same(*results)
    assert_ops(llama, graphs[:2], with_attention=True)


@pytest.mark.parametrize("padded", [False, True])
def test_an_ordinary_call_is_one_graph_each_way(llama, padded):
    """Attention is torch's there: which tokens see each other is only known by values that a tracer cannot read."""
    graphs: list[Counter] = []
    ids = ids_of(llama)
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    more = {"attention_mask": mask} if padded else {}
    function = compiled(llama, graphs)
    labels = torch.where(mask.bool(), ids, -100) if padded else ids
    results = []
    for f in (function, llama):
        llama.zero_grad()
        loss = f(input_ids=ids, labels=labels, use_cache=False, **more).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in llama.named_parameters()}))
    assert_same(*results)
    assert_ops(llama, graphs, with_attention=False)


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(family, marks=pytest.mark.sweep) for family in ("gpt_neox", "qwen3_moe"))]
)
def test_one_compilation_serves_all_lengths_of_ordinary_calls(family):
    model = random_model(family, layers=1).train()
    toolkit.patch(model)
    torch._dynamo.reset()
    counters.clear()
    graphs: list[Counter] = []
    function = compiled(model, graphs, dynamic=True)
    for rows, length in ((2, 19), (3, 23), (5, 7)):
        ids = ids_of(model, rows, length)
        assert_same(step(model, function, ids), step(model, model, ids))
    assert len(graphs) == 2
    assert counters["stats"]["unique_graphs"] == 1


def test_one_compilation_serves_all_lengths_of_ragged_batches():
    """From two sequences on: to torch a size of one is another graph."""
    model = random_model("llama", layers=1).train()
    toolkit.patch(model)
    torch._dynamo.reset()
    counters.clear()
    graphs: list[Counter] = []

    def loss(batch, targets):
        return next_token_loss(ragged_forward(model, batch), targets)

    function = compiled(loss, graphs, dynamic=True)
    for lengths in ([7, 1, 12], [3, 9, 5, 2], [30, 4]):
        tokens = [torch.arange(3, 4 + length) for length in lengths]
        batch = RaggedBatch.from_sequences([one[:-1] for one in tokens], share=False)
        targets = torch.cat([one[1:] for one in tokens])
        value = function(batch, targets)
        value.backward()
        torch.testing.assert_close(value, loss(batch, targets), rtol=1e-6, atol=1e-6)
    assert len(graphs) == 2
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.sweep  # which compiles C++
def test_inductor(llama):
    """The ops inside of generated code: a layer is enough, and takes the compiler long enough."""
    layer = llama.model.layers[0]
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    tables = llama.model.rotary_emb(x, torch.arange(9)[None])

    def run(function):
        llama.zero_grad()
        leaf = x.clone().requires_grad_()
        y = function(leaf, position_embeddings=tables)
        y.square().sum().backward()
        return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters())]

    for got, wanted in zip(run(torch.compile(layer, fullgraph=True)), run(layer), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(llama, reentrant):
    ids = ids_of(llama)
    wanted = step(llama, llama, ids)
    llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = step(llama, llama, ids)
    assert torch.equal(got[0], wanted[0])
    assert all(torch.equal(got[1][name], gradient) for name, gradient in wanted[1].items())


def test_checkpoint_of_the_head_and_loss(llama):
    """The whole model under one checkpoint: the loss, taken from deferred logits, is computed again in backward."""
    ids = ids_of(llama)
    wanted = step(llama, llama, ids)

    def again(**kwargs):
        loss = checkpoint(lambda x: llama(input_ids=x, labels=x, use_cache=False).loss, ids, use_reentrant=False)
        return type("Output", (), {"loss": loss})

    got = step(llama, again, ids)
    assert torch.equal(got[0], wanted[0])
    assert all(torch.equal(got[1][name], gradient) for name, gradient in wanted[1].items())
