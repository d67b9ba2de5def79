"""Run by test_tensor_parallel.py in every rank: a model split over two ranks, against one process."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import toolkit
from tests.helpers.distributed_cases import run_example
from toolkit.errors import ToolkitError
from toolkit.modules.tensor_parallel import group_of_model
from toolkit.moe.sharded_parameters import gather_state_dict
from toolkit.ops.collectives import copy_to_ranks, gather_from_ranks, reduce_from_ranks, share, split_to_ranks
from toolkit.patching import report_of, state_spec
from toolkit.patching.tensor_parallel import TensorParallel
from toolkit.patching.weights import weight_version
from toolkit.testing.models import random_model
from toolkit.testing.oracle import eager, lifted_to_double

TEXTS = [[5, 6, 7, 8, 9, 11, 3], [5, 6, 7, 1], [20] * 33, [4, 4]]


def split(family: str, numerics: str = "bitwise", **settings: Any) -> tuple[Any, Any, TensorParallel]:
    """A patched model on its own, and one with the same weights that is split over all ranks."""
    whole, model = random_model(family, **settings), random_model(family, **settings)
    toolkit.patch(whole, numerics=numerics)
    toolkit.patch(model, numerics=numerics)
    return whole, model, toolkit.tensor_parallel(model)


def loss_of(model: nn.Module, texts: list[list[int]]) -> Tensor:
    return -torch.cat(toolkit.token_logprobs(model, texts)).mean()


def gradients(model: nn.Module, parallel: TensorParallel | None, texts: list[list[int]]) -> dict[str, Tensor]:
    """Of the whole parameters, by name."""
    model.zero_grad()
    loss_of(model, texts).backward()
    found = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        sharded = parallel is not None and name in parallel.parameters
        found[name] = parallel.gather(parameter, grad) if sharded and parallel is not None else grad.clone()
    return found


def oracle(family: str, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities and gradients of unpatched transformers in float64, text by text."""
    stock = eager(random_model(family, **settings).double())
    found = []
    with lifted_to_double():
        for text in TEXTS:
            logits = stock(input_ids=torch.tensor([text])).logits[0, :-1].log_softmax(-1)
            found.append(logits.gather(1, torch.tensor(text[1:])[:, None])[:, 0])
        (-torch.cat(found).mean()).backward()
    zero = torch.zeros(())
    return torch.cat(found).detach(), {n: zero if p.grad is None else p.grad for n, p in stock.named_parameters()}


def collectives(rank: int, size: int) -> None:
    """The four maps are each other's adjoints, for widths that the ranks do not divide, and op checks."""
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    for width in (1, 5, 8):
        for dim in (0, 1, -1):
            source = torch.Generator().manual_seed(width)
            whole = torch.randn([width if at == dim % 3 else 3 for at in range(3)], generator=source)
            mine = share(width, rank, size)
            part = whole.narrow(dim, mine.start, mine.stop - mine.start)
            leaf = part.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()  # of no usual strides
            gathered = gather_from_ranks(leaf, dim, width, group)
            assert torch.equal(gathered, whole)
            gathered.backward(whole)
            assert torch.equal(leaf.grad, part)
            leaf = whole.clone().requires_grad_()
            taken = split_to_ranks(leaf, dim, group)
            assert torch.equal(taken, part)
            taken.backward(part * 2)
            assert torch.equal(leaf.grad, whole * 2)
    for count in (0, 7, 70001):  # one collective, and two
        x = torch.randn(count, generator=torch.Generator().manual_seed(rank))
        every = [torch.randn(count, generator=torch.Generator().manual_seed(one)) for one in range(size)]
        expected = every[0]
        for one in every[1:]:
            expected = expected + one
        leaf = x.clone().requires_grad_()
        total = reduce_from_ranks(leaf, group)
        assert torch.equal(total, expected)
        total.backward(x)
        assert torch.equal(leaf.grad, x)
        leaf = expected.clone().requires_grad_()
        copy_to_ranks(leaf, group).backward(x)
        assert torch.equal(leaf.grad, expected)
        narrow = reduce_from_ranks(x.bfloat16(), group)
        assert torch.equal(
            narrow, sum((one.bfloat16().float() for one in every[1:]), every[0].bfloat16().float()).bfloat16()
        )
    ops = torch.ops.toolkit
    x = torch.randn(2, 3, requires_grad=True)
    torch.library.opcheck(ops.gather_from_ranks.default, (x, 1, 3 * size, group))
    torch.library.opcheck(ops.reduce_from_ranks.default, (x, group))


def forward_and_gradients(rank: int, size: int, families: list[str], numerics: str, **settings: Any) -> None:
    """Log-probabilities are one process's, bitwise in bitwise mode; gradients are the oracle's, and repeat."""
    for family in families:
        whole, model, parallel = split(family, numerics, **settings)
        alone = torch.cat(toolkit.token_logprobs(whole, TEXTS)).detach()
        found = torch.cat(toolkit.token_logprobs(model, TEXTS)).detach()
        values, expected = oracle(family, **settings)
        if numerics == "bitwise":
            assert torch.equal(found, alone), family
        assert (found - values).abs().max() <= 1e-4, family
        once, again = (gradients(model, parallel, TEXTS) for _ in range(2))
        alone_too = gradients(whole, None, TEXTS)
        largest = max(float(one.norm()) for one in expected.values())
        for name, grad in once.items():
            assert torch.equal(grad, again[name]), (family, name)
            everywhere = [torch.empty_like(grad) for _ in range(size)]
            dist.all_gather(everywhere, grad.contiguous())
            assert all(torch.equal(one, grad) for one in everywhere), (family, name)
            error = (grad.double() - expected[name]).norm()
            scale = expected[name].norm() + 1e-3 * largest
            of_one = (alone_too[name].double() - expected[name]).norm()
            assert error <= max(3e-5 * scale, 2 * of_one), (family, name, float(error / scale))
        held = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in whole.parameters())
        assert held < 0.75, family
        with parallel.gathered():
            there = dict(whole.named_parameters())
            assert all(torch.equal(p, there[name]) for name, p in model.named_parameters())
            assert group_of_model(model) is None
        assert group_of_model(model) is not None


def forward_and_gradients_of_three(rank: int, size: int) -> None:
    """Six heads of three key heads; vocabulary, hidden size and intermediate size are no multiples of three."""
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
    forward_and_gradients(rank, size, ["qwen3"], "bitwise", hidden=40, intermediate_size=100, **heads)
    forward_and_gradients(rank, size, ["qwen3"], "fast", hidden=40, intermediate_size=100, **heads)


def training(rank: int, size: int, families: list[str], steps: int) -> None:
    """Losses of one process over ``steps`` steps of AdamW: to 1e-5 with clipping, and to 1e-9 in float64."""
    for family in families:
        for dtype, rate, limit in ((torch.float32, 2e-4, 1e-5), (torch.float64, 1e-3, 1e-9)):
            whole, model = random_model(family).to(dtype), random_model(family).to(dtype)
            toolkit.patch(whole)
            toolkit.patch(model)
            parallel = toolkit.tensor_parallel(model)
            losses = []
            for one, clip in ((whole, nn.utils.clip_grad_norm_), (model, parallel.clip)):
                one.train()
                if family == "llama":
                    one.gradient_checkpointing_enable()  # layers run again in the backward, on all ranks
                optimizer = torch.optim.AdamW(one.parameters(), lr=rate)
                of_one = []
                for step in range(steps):
                    source = torch.Generator().manual_seed(step % 5)
                    loss = loss_of(one, torch.randint(3, 90, (3, 12), generator=source).tolist())
                    loss.backward()
                    if dtype is torch.float32:  # a norm is a float32 number
                        clip(one.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    of_one.append(loss.item())
                losses.append(of_one)
            assert losses[0][-1] < losses[0][0] - 0.1
            apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
            assert apart <= limit, (family, dtype, apart)
            saved, expected = gather_state_dict(model, parallel), whole.state_dict()
            assert saved.keys() == expected.keys()
            for name, value in saved.items():
                assert (value - expected[name]).abs().max() <= 1e-3, (family, name)


def schedule(model: nn.Module, seed: int) -> tuple[list[Any], dict[str, float]]:
    """What a random run of an engine gives: prompts with common prefixes, few blocks, cancelled requests."""
    chance = random.Random(seed)
    settings = {"num_blocks": chance.choice([9, 12, 200]), "swap_space": chance.choice([0, 1])}
    found = []
    with toolkit.Engine(
        model, max_num_seqs=4, max_num_batched_tokens=chance.choice([8, 24]), block_size=4, max_model_len=32, **settings
    ) as engine:
        head = [chance.randrange(3, 90) for _ in range(9)]
        requests = []
        for _ in range(9):
            prompt = head * (chance.random() < 0.5) + [chance.randrange(3, 90) for _ in range(chance.randrange(1, 7))]
            temperature = chance.choice([0.0, 1.0])
            params = toolkit.SamplingParams(
                max_tokens=chance.randrange(4, 12), temperature=temperature, ignore_eos=True, timeout=600.0
            )
            requests.append(engine.submit(prompt, params))  # without a seed: the ranks' engines agree on one
            for _ in range(chance.randrange(0, 3)):
                found += engine.step()
            if chance.random() < 0.1:
                engine.cancel(chance.choice(requests))
        while engine.has_work:
            found += engine.step()
        engine.check_integrity()
        stats = engine.stats()
    ended = [(delta.request_id, delta.finished) for delta in found if delta.finished is not None]
    return [
        (number, one.token_ids, one.logprobs, one.finish_reason) for number, one in sorted(ended, key=lambda x: x[0])
    ], stats


def engines(rank: int, size: int, families: list[str], seeds: int) -> None:
    """Tokens and log-probabilities of random schedules are those of an engine of one process, bitwise."""
    for family in families:
        whole, model, _ = split(family)
        preempted = hits = 0.0
        for seed in range(seeds):
            with pytest.MonkeyPatch.context() as patched:  # the engines of both get one seed from the system
                patched.setattr("numpy.random.SeedSequence", lambda seed=seed: type("Entropy", (), {"entropy": seed}))
                expected, _ = schedule(whole, seed)
                patched.setattr(
                    "numpy.random.SeedSequence", lambda seed=seed: type("Entropy", (), {"entropy": seed + 100 * rank})
                )
                found, stats = schedule(model, seed)
            assert found == expected, (family, seed)
            preempted, hits = preempted + stats["num_preemptions"], hits + stats["prefix_cache_hits"]
        assert hits > 0
        assert seeds < 4 or preempted > 0
        ours = {spec.layer: spec.shapes[0][0] for spec in state_spec(model) if spec.kind == "full"}
        theirs = {spec.layer: spec.shapes[0][0] for spec in state_spec(whole) if spec.kind == "full"}
        assert theirs
        assert {layer: heads * size for layer, heads in ours.items()} == theirs  # a part of keys and values here


def rollouts(rank: int, size: int) -> None:
    """Rollouts of a group and steps on their tokens: log-probabilities of both are bitwise identical."""
    whole, model, parallel = split("qwen3")
    ended = []
    for one, clip in ((whole, nn.utils.clip_grad_norm_), (model, parallel.clip)):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
        versions, rewards, last = set(), [], None
        with toolkit.Engine(one, seed=3) as engine:
            for _ in range(8):
                version = weight_version(one)
                params = toolkit.SamplingParams(n=8, max_tokens=6, temperature=1.0, ignore_eos=True)
                samples = engine.generate([[5, 6, 7, 8]], params)
                assert {number for sample in samples for number in sample.weight_versions} == {version}
                versions.add(version)
                texts = [sample.prompt_token_ids + sample.token_ids for sample in samples]
                logprobs = toolkit.token_logprobs(one, texts, last=[6] * len(texts))
                for sample, own in zip(samples, logprobs, strict=True):
                    assert torch.equal(own.detach(), torch.tensor(sample.logprobs))
                reward = torch.tensor([sum(token < 48 for token in sample.token_ids) / 6 for sample in samples])
                rewards.append(reward.mean().item())
                advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
                last = -(torch.stack(logprobs) * advantage[:, None]).mean()
                last.backward()
                clip(one.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            assert engine.backend.graphs.captured  # collectives and all
        assert len(versions) == 8
        ended.append((rewards, last))
    assert ended[0][0][0] == ended[1][0][0]  # the first rollout, before any gradient
    assert ended[1][0][-1] > ended[1][0][0]
    fresh = random_model("qwen3", layers=2)
    fresh_weights = {name: value + 0.01 for name, value in fresh.state_dict().items()}
    before = weight_version(model)
    parallel.load_state_dict(fresh_weights)
    assert weight_version(model) != before
    whole.load_state_dict(fresh_weights)
    params = toolkit.SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    with toolkit.Engine(whole) as alone, toolkit.Engine(model) as engine:
        assert engine.generate([[5, 6]], params)[0].logprobs == alone.generate([[5, 6]], params)[0].logprobs


def adapters(rank: int, size: int, folders: dict[str, Path]) -> None:
    """Requests that choose adapters of a split model: tokens and log-probabilities of one process, bitwise."""
    for family, numerics in (("llama", "bitwise"), ("qwen3", "fast")):
        whole, model, parallel = split(family, numerics)
        ended = []
        for one in (whole, model):
            found: list[Any] = []
            with toolkit.Engine(one, max_num_seqs=4, block_size=4, max_model_len=32, max_loras=2) as engine:
                for name in ("narrow", "every"):
                    engine.load_adapter(name, folders[f"{family}/{name}"])
                for temperature in (0.0, 1.0):
                    params = [
                        toolkit.SamplingParams(
                            max_tokens=8, temperature=temperature, seed=at, lora_name=name, ignore_eos=True
                        )
                        for at, name in enumerate((None, "narrow", "every", "narrow", None, "every"))
                    ]
                    found += engine.generate([[5, 6, 7, at % 3 + 8] for at in range(6)], params)
                assert engine.backend.graphs.captured
                if one is model:
                    with pytest.raises(
                        ToolkitError, match="must have use_dora false for a model that is split over ranks, got true"
                    ):
                        engine.load_adapter("dora", folders[f"{family}/dora"])
                    engine.unload_adapter("narrow")
                    again = engine.generate([[5, 6, 7, 8]], toolkit.SamplingParams(max_tokens=8, temperature=0))
                    assert again[0].logprobs[0] == pytest.approx(found[0].logprobs[0], abs=1e-5)
            ended.append([(one.token_ids, one.logprobs) for one in found])
        if numerics == "bitwise":
            assert ended[0] == ended[1]
        assert len({tuple(logprobs) for _, logprobs in ended[1][:3]}) == 3  # each of them does something
        for mine, theirs in zip(*ended, strict=True):
            assert mine[1][0] == pytest.approx(theirs[1][0], abs=1e-5)
        weights = {name: value.clone() for name, value in random_model(family).state_dict().items()}
        parallel.load_state_dict(weights)  # under the names that the model has without adapters


def adapter_gradients(rank: int, size: int, folder: Path) -> None:
    """A model with LoRA is split: log-probabilities of one process, bitwise, and equal gradients of all factors."""
    import peft

    made = []
    for _ in range(2):
        adapted = peft.PeftModel.from_pretrained(random_model("llama"), str(folder), is_trainable=True)
        toolkit.patch(adapted.get_base_model(), numerics="bitwise")
        made.append(adapted)
    whole, model = made
    parallel = toolkit.tensor_parallel(model)
    for one in made:
        loss_of(one, TEXTS).backward()
    assert torch.equal(*(torch.cat(toolkit.token_logprobs(one, TEXTS)).detach() for one in made))
    expected = {name: one.grad for name, one in whole.named_parameters() if one.grad is not None}
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert found.keys() == expected.keys()
    assert any("o_proj" in name for name in found)
    for name, grad in found.items():
        everywhere = [torch.empty_like(grad) for _ in range(size)]
        dist.all_gather(everywhere, grad.contiguous())
        assert all(torch.equal(one, grad) for one in everywhere), name
        assert (grad - expected[name]).norm() <= 1e-5 * max(float(expected[name].norm()), 1e-3), name
    with parallel.gathered():
        there = dict(whole.named_parameters())
        assert all(torch.equal(p, there[name]) for name, p in model.named_parameters())


def errors(rank: int, size: int) -> None:
    """What cannot be split, and what a split model cannot do, is one sentence on every rank."""

    def refused(why: str, use: Any) -> None:
        with pytest.raises(ToolkitError, match=re.escape(why)):
            use()

    bare = random_model("llama")
    refused("must be patched before it is split", lambda: toolkit.tensor_parallel(bare))
    heads = random_model("gemma")
    toolkit.patch(heads)
    refused(
        f"tensor_parallel_size must divide num_key_value_heads of GemmaForCausalLM, 1, got {size}",
        lambda: toolkit.tensor_parallel(heads),
    )
    without = random_model("mamba2")
    toolkit.patch(without)
    refused(
        "needs a model with a plan",
        lambda: without.__dict__.__setitem__("_tp_plan", {}) or toolkit.tensor_parallel(without),
    )
    unknown = random_model("llama")
    toolkit.patch(unknown)
    unknown._tp_plan = {**unknown.tp_plan, "model.layers.*.mlp.up_proj": "mla_kv_a_proj"}
    refused("style 'mla_kv_a_proj'", lambda: toolkit.tensor_parallel(unknown))
    wrong = random_model("llama")
    toolkit.patch(wrong)
    wrong._tp_plan = {**wrong.tp_plan, "model.layers.*.mlp.up_proj": "colwise_gather_output"}
    refused("LlamaForCausalLM cannot be split over", lambda: toolkit.tensor_parallel(wrong))
    assert wrong.model.layers[0].mlp.up_proj.weight.shape == bare.model.layers[0].mlp.up_proj.weight.shape
    different = random_model("llama")
    toolkit.patch(different)
    with torch.no_grad():
        different.model.norm.weight.add_(float(rank))
    refused("parameter model.norm.weight must be equal on all ranks", lambda: toolkit.tensor_parallel(different))
    _, model, parallel = split("llama")
    refused("must be gathered for tensor parallel", lambda: toolkit.tensor_parallel(model))
    refused("must be gathered for unpatching", lambda: toolkit.unpatch(model))
    refused("must be gathered for another patch", lambda: toolkit.patch(model, numerics="fast"))
    refused("must be gathered for an export", lambda: toolkit.export(model, "nowhere"))
    refused("must be gathered to be saved", lambda: model.save_pretrained("nowhere"))
    refused(
        "speculative_config must be None",
        lambda: toolkit.Engine(model, speculative_config={"method": "ngram", "num_speculative_tokens": 2}),
    )
    refused(
        "weights must have tensors of LlamaForCausalLM only", lambda: parallel.load_state_dict({"x": torch.zeros(1)})
    )
    refused("must have the shape", lambda: parallel.load_state_dict({"lm_head.weight": torch.zeros(1, 2)}))
    engine = toolkit.Engine(model)
    refused("engine must be a LeadingEngine", lambda: toolkit.AsyncEngine(engine))
    refused("adapter 'nowhere' must be a folder with", lambda: engine.load_adapter("a", "nowhere"))
    with parallel.gathered():
        refused("the model must be split over ranks", lambda: engine.generate([[5]]))
    engine.close()
    parallel.undo()
    toolkit.unpatch(model)
    assert report_of(model) is None
    assert torch.equal(model.lm_head.weight, bare.lm_head.weight)


def example(rank: int, size: int, folder: Path) -> None:
    """The script of docs/distributed.md."""
    run_example("Tensor parallel", folder)
