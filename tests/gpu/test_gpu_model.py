"""A patched model on a GPU: training steps, torch.compile, generation, and rollout equal to training."""

import copy
import itertools

import pytest
import torch

import toolkit
from tests.helpers.bounds import integers
from tests.helpers.implementations import HALF, SMALL, TRITON
from toolkit.modules import head
from toolkit.patching import ragged_forward
from toolkit.state import RaggedBatch
from toolkit.testing.models import random_model
from toolkit.training.losses import next_token_loss

SIZES = {"hidden": 16, "layers": 1, "vocabulary": 67} if SMALL else {"hidden": 256, "layers": 2, "vocabulary": 1031}
LENGTHS = [3, 1, 5] if SMALL else [17, 1, 40, 129, 6]


# On CPU, in the interpreter, a minute.
pytestmark = pytest.mark.sweep if SMALL else pytest.mark.gpu
DEVICE = TRITON.device
needs_device = pytest.mark.skipif(SMALL, reason="needs a CUDA device, and this machine has none")


@pytest.fixture(autouse=True)
def triton_serves_cpu_tensors():
    if not SMALL:
        yield
        return
    with TRITON.active():
        yield


@pytest.fixture(autouse=True)
def heads_of_a_gpu(monkeypatch):
    """In the interpreter, too, heads in bitwise mode do not defer: only on a CPU is the loss bitwise identical."""
    if SMALL:
        can_defer = head._can_defer
        monkeypatch.setattr(head, "_can_defer", lambda w, x, bitwise: not bitwise and can_defer(w, x, bitwise))


def model_of(family, dtype=torch.float32):
    return random_model(family, **SIZES).to(DEVICE, dtype)


def packed(seed=0):
    """(batch, targets) of packed sequences."""
    sequences = [integers(0, SIZES["vocabulary"], n + 1, seed=seed + i).to(DEVICE) for i, n in enumerate(LENGTHS)]
    batch = RaggedBatch.from_sequences([one[:-1] for one in sequences], device=DEVICE)
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


@needs_device
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


@pytest.mark.parametrize("family", ["llama"] if SMALL else ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32] if SMALL else [torch.float32, HALF])
def test_what_the_engine_returns_is_what_training_computes(family, dtype):
    """Bitwise mode: every log-probability, over batches, chunks, shared prefixes and preemption."""
    model = model_of(family, dtype)
    toolkit.patch(model, numerics="bitwise")
    few = 3 if SMALL else 24
    prompts = [
        integers(3, SIZES["vocabulary"], n, seed=n).to(DEVICE).tolist()
        for n in ([2, 7] if SMALL else [2, 7, 30, 61, 90])
    ]
    prompts.append([*prompts[-1][: len(prompts[-1]) // 2], 5, 6])
    params = [
        toolkit.SamplingParams(max_tokens=few, temperature=heat, top_p=top_p, ignore_eos=True, seed=3, n=n)
        for heat, top_p, n in zip(
            itertools.cycle([0.0, 1.0, 0.8]), itertools.cycle([1.0, 0.9]), (1, 1, 2, 1, 1, 1)[: len(prompts)]
        )
    ]
    differing = total = 0
    for limits in SCHEDULES[:1] if SMALL else SCHEDULES:
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


def tiny(name, dtype):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config).to("cuda", dtype).eval()


@needs_device
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patched_model_trains_like_the_unpatched_one(name, dtype):
    stock = tiny(name, dtype)
    exact, patched = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    toolkit.patch(patched)
    ids = integers(0, 512, 3, 70).to(DEVICE)
    losses, gradients = [], []
    for model in (stock, patched, exact):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(float(loss))
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert abs(losses[1] - losses[2]) / abs(losses[2]) < limit
    # Half precision: as near to the float64 model as the unpatched one is, give or take its own rounding.
    assert relative(gradients[1], gradients[2]) < max(2 * relative(gradients[0], gradients[2]), limit)


@needs_device
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_engine_greedy_equals_generate(name):
    from benchmarks.end_to_end.serve import Generate, compare, make_prompts

    stock = tiny(name, torch.float32)
    prompts = make_prompts(6, 37, 512)
    expected = Generate(stock)(prompts, 40)
    with toolkit.Engine(copy.deepcopy(stock), max_num_seqs=4, max_model_len=128) as engine:
        params = toolkit.SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        got = [list(completion.token_ids) for completion in engine.generate(prompts, params)]
    counts = compare(stock, prompts, got, expected)
    assert counts["mismatches"] == 0
    assert counts["equal"] >= len(prompts) - 1
