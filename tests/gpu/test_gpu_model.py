"""A patched model on a GPU in both tiers: training steps, torch.compile, generation, and rollout equal to training."""

import copy
import itertools

import pytest
import torch

import toolkit
from benchmarks.gpu.device import DEVICE, DRY
from tests.helpers.bounds import HALF, integers, needs_cuda, needs_device
from toolkit.modules import head
from toolkit.patching import ragged_forward
from toolkit.state import RaggedBatch
from toolkit.testing.models import random_model
from toolkit.training.losses import next_token_loss

pytestmark = [pytest.mark.gpu, needs_device]

SIZES = {"hidden": 16, "layers": 1, "vocabulary": 67} if DRY else {"hidden": 256, "layers": 2, "vocabulary": 1031}
LENGTHS = [3, 1, 5] if DRY else [17, 1, 40, 129, 6]


@pytest.fixture(autouse=True)
def heads_of_a_gpu(monkeypatch):
    """In the interpreter, too, heads of the bitwise tier do not wait: only on a CPU has the loss their bits."""
    if DRY:
        may_wait = head._may_wait
        monkeypatch.setattr(head, "_may_wait", lambda w, x, bitwise: not bitwise and may_wait(w, x, bitwise))


def model_of(family, dtype=torch.float32):
    return random_model(family, **SIZES).to(DEVICE, dtype)


def packed(seed=0):
    """(batch, targets) of packed sequences."""
    sequences = [integers(0, SIZES["vocabulary"], n + 1, seed=seed + i) for i, n in enumerate(LENGTHS)]
    batch = RaggedBatch.from_sequences([one[:-1] for one in sequences], device=torch.device(DEVICE))
    return batch, torch.cat([one[1:] for one in sequences])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def relative(value, expected):
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def unpatched_loss(model, batch, targets):
    """Mean cross-entropy, sequence by sequence."""
    losses, begin = [], 0
    for one in targets.split(LENGTHS):
        logits = model(input_ids=batch.tokens[None, begin : begin + one.numel()], use_cache=False).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, one, reduction="none"))
        begin += one.numel()
    return torch.cat(losses).mean()


@pytest.mark.parametrize("numerics", ["bitwise", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_ragged_training_step(numerics, dtype):
    """Loss and gradients against the unpatched model in float64; and a step of an optimizer."""
    stock = model_of("llama", dtype).train()
    exact, model = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    toolkit.patch(model, numerics=numerics)
    batch, targets = packed()
    wanted = unpatched_loss(exact, batch, targets)
    expected = gradients(exact, wanted)
    loss = next_token_loss(ragged_forward(model, batch), targets)
    got = gradients(model, loss)
    # 16 bits: as near to float64 as the unpatched model is, give or take its own rounding.
    own = relative(gradients(stock, unpatched_loss(stock, batch, targets)), expected)
    assert relative(loss.detach(), wanted.detach()) < (1e-5 if dtype == torch.float32 else 3e-2)
    assert relative(got, expected) < max(2 * own, 1e-5)
    assert torch.equal(got, gradients(model, next_token_loss(ragged_forward(model, batch), targets)))
    if dtype == torch.float32:  # a step this small would be lost in 16 bits
        torch.optim.SGD(model.parameters(), lr=0.05 / float(got.norm())).step()
        with torch.no_grad():
            assert float(next_token_loss(ragged_forward(model, batch), targets)) < float(loss.detach())


@needs_cuda
@pytest.mark.parametrize("numerics", ["bitwise", "fast"])
def test_a_compiled_ragged_step_is_one_graph(numerics):
    model = model_of("llama").train()
    toolkit.patch(model, numerics=numerics)

    def loss(batch, targets):
        return next_token_loss(ragged_forward(model, batch), targets)

    function = torch.compile(loss, fullgraph=True)
    for seed in (0, 100):
        batch, targets = packed(seed)
        results = [(value.detach(), gradients(model, value)) for f in (function, loss) for value in [f(batch, targets)]]
        assert relative(results[0][0], results[1][0]) < 1e-5
        assert relative(results[0][1], results[1][1]) < 1e-4
    torch._dynamo.reset()


SCHEDULES = [
    {"max_num_seqs": 8, "max_num_batched_tokens": 512, "block_size": 16},
    {"max_num_seqs": 3, "max_num_batched_tokens": 33, "block_size": 8},
    {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 4, "num_blocks": 60},
]


@pytest.mark.parametrize("family", ["llama"] if DRY else ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32] if DRY else [torch.float32, HALF])
def test_what_the_engine_returns_is_what_training_computes(family, dtype):
    """The bitwise tier: every log-probability, over batches, chunks, shared prefixes and preemption."""
    model = model_of(family, dtype)
    toolkit.patch(model, numerics="bitwise")
    few = 3 if DRY else 24
    prompts = [integers(3, SIZES["vocabulary"], n, seed=n).tolist() for n in ([2, 7] if DRY else [2, 7, 30, 61, 90])]
    prompts.append([*prompts[-1][: len(prompts[-1]) // 2], 5, 6])
    params = [
        toolkit.SamplingParams(max_tokens=few, temperature=heat, top_p=top_p, ignore_eos=True, seed=3, n=n)
        for heat, top_p, n in zip(
            itertools.cycle([0.0, 1.0, 0.8]), itertools.cycle([1.0, 0.9]), (1, 1, 2, 1, 1, 1)[: len(prompts)]
        )
    ]
    differing = total = 0
    for limits in SCHEDULES[:1] if DRY else SCHEDULES:
        with toolkit.Engine(model, max_model_len=128, **limits) as engine:
            outputs = engine.generate(prompts, params)
        texts = [[*one.prompt_token_ids, *one.token_ids] for one in outputs]
        for output, logprobs in zip(outputs, toolkit.token_logprobs(model, texts), strict=True):
            assert output.finish_reason == "length"
            trained = logprobs.detach()[len(output.prompt_token_ids) - 1 :].double().cpu()
            returned = torch.tensor(output.logprobs, dtype=torch.float64)
            differing += int((trained != returned).sum())
            total += returned.numel()
            assert float((trained - returned).abs().max()) < (1e-4 if dtype == torch.float32 else 0.2)
    assert (differing, total >= 3 * few) == (0, True), f"{differing} of {total} differ"
