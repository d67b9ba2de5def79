"""Are the engine's log-probabilities bitwise identical to the training forward's, under every schedule?

Random schedules: batch composition, arrival, chunk size, block size, prefix hits, forks, preemption, swapping, sleep,
and where it is asked for, writes to the weights between and during generations.
The training forward then computes the same sequences packed in random groups.
"""

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from toolkit.engine import Engine, SamplingParams
from toolkit.numerics import Numerics
from toolkit.patching import patch, report_of, state_spec, token_logprobs, unpatch
from toolkit.testing.weight_writes import WeightWrite, weight_writes


@dataclass
class Parity:
    """Totals over all schedules.

    Args:
        tokens: sampled tokens that were compared.
        differing: tokens whose log-probability is not ``torch.equal``.
        replayed: tokens that training computed again with the routing or the selected keys that the engine recorded.
        replayed_differing: those of them that differ.
        largest: largest absolute difference of log-probabilities, in nats, replayed ones included.
        rotary_crossings: completions that grew past a length after which the model's rotary tables are others.
    """

    tokens: int = 0
    differing: int = 0
    replayed: int = 0
    replayed_differing: int = 0
    largest: float = 0.0
    schedules: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    num_swaps: int = 0
    forked: int = 0
    chunked_prompts: int = 0
    rotary_crossings: int = 0
    writes: Counter[str] = field(default_factory=Counter)
    numerics: str = ""
    details: list[str] = field(default_factory=list)


def check_parity(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    min_tokens: int = 2000,
    seed: int = 0,
    numerics: str | None = None,
    max_new_tokens: int = 40,
    writes: bool = False,
) -> Parity:
    """The comparison of at least ``min_tokens`` tokens, generated under random schedules. Patches the model.

    An MoE model, and one with sparse attention, is compared twice: with its routers' and indexers' choice in training,
    and with what the engine recorded replayed.

    Args:
        prompts: token ids; each schedule takes a random subset, some truncated or extended to share prefixes.
        seed: of the schedules.
        numerics: mode to patch with; None is the device's default.
        max_new_tokens: per completion.
        writes: write the weights at random steps, in every way of ``weight_writes``. Tokens of requests with state of
            other weights are not compared. The model's weights are others afterwards.
    """
    report = patch(model, numerics=numerics)
    source = random.Random(seed)
    result = Parity(numerics=str(report.numerics))
    kinds = weight_writes(model) if writes else {}
    while result.tokens < min_tokens or len(result.writes) < len(kinds):
        result.schedules += 1
        _one_schedule(model, prompts, source, result, max_new_tokens, kinds)
    return result


def _one_schedule(
    model: Any,
    prompts: Sequence[Sequence[int]],
    source: random.Random,
    result: Parity,
    max_new_tokens: int,
    writes: dict[str, WeightWrite],
) -> None:
    chosen = [list(source.choice(prompts)) for _ in range(source.randint(4, 14))]
    for index in range(1, len(chosen)):
        if source.random() < 0.4:  # share a prefix of an earlier prompt
            stem = chosen[source.randrange(index)]
            chosen[index] = stem[: source.randint(1, len(stem))] + chosen[index][: source.randint(1, 9)]
    block_size = source.choice([4, 8, 16])
    counts = [source.choice([1, 1, 1, 2, 3]) for _ in chosen]
    longest = max(len(prompt) for prompt in chosen) + max_new_tokens
    # In most schedules blocks for one to three long sequences: the rest wait, and the youngest are preempted.
    capacity = source.choice([1.0, 1.5, 2.5, 50.0])
    budget = source.choice([5, 16, 33, 64, 512])
    states = {spec.kind for spec in state_spec(model)}
    engine_args: dict[str, Any] = {
        "max_num_seqs": source.choice([4, 8, 32]),
        "max_num_batched_tokens": budget,
        "block_size": block_size,
        "num_blocks": int(capacity * (longest // block_size + 2)),
        "swap_space": source.choice([0, None]),
        "enable_return_routed_experts": "routing" in states,
        "enable_return_selected_keys": "selection" in states,
    }
    params = [
        SamplingParams(
            n=n,
            max_tokens=source.randint(1, max_new_tokens),
            temperature=source.choice([0.0, 0.7, 1.0, 1.3]),
            top_p=source.choice([1.0, 0.9]),
            ignore_eos=True,
            seed=source.randrange(2**31),
        )
        for n in counts
    ]
    with Engine(model, **engine_args) as engine:
        waiting = list(zip(chosen, params))
        completions: list[Any] = []
        mixed: set[int] = set()  # requests with state of other weights than those of now
        while waiting or engine.has_work:
            for _ in range(min(len(waiting), source.choice([0, 1, 1, 2, 5]) if engine.has_work else 3)):
                engine.submit(*waiting.pop(0))
            completions += [delta.finished for delta in engine.step() if delta.finished is not None]
            if source.random() < 0.04:  # as for a training step between two rollout steps
                engine.sleep()
                engine.wake()
            if writes and source.random() < 0.03:
                _compare_in_groups(model, [one for one in completions if one.request_id not in mixed], source, result)
                completions = []
                mixed |= _begun(engine)
                # Each way once before any comes again.
                fewest = min(result.writes[kind] for kind in writes)
                kind = source.choice([kind for kind in writes if result.writes[kind] == fewest])
                result.writes[kind] += 1
                writes[kind](model, source)
        stats = engine.stats()
    result.prefix_cache_hits += int(stats["prefix_cache_hits"])
    result.num_preemptions += int(stats["num_preemptions"])
    result.num_swaps += int(stats["num_swaps"])
    result.forked += sum(n - 1 for n in counts)
    result.chunked_prompts += sum(len(prompt) > budget for prompt in chosen)
    result.rotary_crossings += sum(_crosses(model, completion) for completion in completions)
    _compare_in_groups(model, [one for one in completions if one.request_id not in mixed], source, result)


def _begun(engine: Engine) -> set[int]:
    """Requests with tokens or state of the weights as they are."""
    sequences = engine.scheduler.running + engine.scheduler.waiting
    return {s.request.request_id for s in sequences if s.generated or s.block_tables is not None or s.swapped}


def _compare_in_groups(model: Any, completions: list[Any], source: random.Random, result: Parity) -> None:
    source.shuffle(completions)
    while completions:
        group = [completions.pop() for _ in range(min(len(completions), source.randint(1, 6)))]
        _compare(model, group, result)


def _crosses(model: Any, completion: Any) -> bool:
    report = report_of(model)
    regimes = None if report is None else report.rotary_regimes()
    prompt, tokens = len(completion.prompt_token_ids), len(completion.token_ids)
    return regimes is not None and regimes.canonical(prompt) != regimes.canonical(prompt + tokens)


def _compare(model: Any, group: Sequence[Any], result: Parity) -> None:
    for completion in group:
        if completion.finish_reason == "error":
            raise RuntimeError(f"request {completion.request_id} failed: {completion.error}")
    result.tokens += sum(_compared(model, completion) for completion in group)
    result.differing += _differing(model, group, {}, result)
    recorded = {
        "routing": [completion.routed_experts for completion in group],
        "selection": [completion.selected_keys for completion in group],
    }
    recorded = {name: found for name, found in recorded.items() if all(one is not None for one in found)}
    if "routing" in recorded and not _replays(model, recorded["routing"][0].shape[1]):
        del recorded["routing"]
    if recorded:
        result.replayed += sum(len(completion.token_ids) for completion in group)
        result.replayed_differing += _differing(model, group, recorded, result)


def _compared(model: Any, completion: Any) -> int:
    """How many of its tokens are compared: those before one that the model takes for padding."""
    report = report_of(model)
    token = None if report is None else report.ragged.uncounted_token
    tokens = completion.token_ids
    return tokens.index(token) if token in tokens else len(tokens)


def _replays(model: Any, layers: int) -> bool:
    """Whether the routers of all MoE layers are patched, which replaying needs."""
    report = report_of(model)
    return report is not None and report.roles().get("router", 0) >= layers


def _differing(model: Any, group: Sequence[Any], recorded: dict[str, Any], result: Parity) -> int:
    """How many of the group's tokens differ from the training forward's, which takes what is ``recorded``."""
    # With gradients, as in a training step.
    with torch.enable_grad():
        compared = [_compared(model, completion) for completion in group]
        sequences = [list(c.prompt_token_ids) + list(c.token_ids[:count]) for c, count in zip(group, compared)]
        rotary_lengths = [completion.rotary_length for completion in group]
        trained = token_logprobs(model, sequences, rotary_lengths=rotary_lengths, **recorded)
    differing = 0
    for completion, count, logprobs in zip(group, compared, trained):
        returned = torch.tensor(completion.logprobs[:count], dtype=torch.float64)
        expected = logprobs.detach().cpu()[len(completion.prompt_token_ids) - 1 :].double()
        differing += int((~((returned == expected) | (returned.isnan() & expected.isnan()))).sum())
        if returned.numel():
            result.largest = max(result.largest, float((returned - expected).abs().max()))
    return differing


@dataclass(frozen=True)
class Overhead:
    """Seconds of the same work in the two modes: generation by the engine, and a training forward and backward."""

    generate_bitwise: float
    generate_fast: float
    train_bitwise: float
    train_fast: float

    @property
    def generate_ratio(self) -> float:
        """Time to generate, bitwise / fast."""
        return self.generate_bitwise / self.generate_fast

    @property
    def train_ratio(self) -> float:
        """Time of a training forward and backward, bitwise / fast."""
        return self.train_bitwise / self.train_fast


def bitwise_overhead(model: Any, prompts: Sequence[Sequence[int]], repeats: int = 3, new_tokens: int = 32) -> Overhead:
    """Seconds of bitwise and fast mode on the same prompts: medians of interleaved repeats.

    Restores the model's patch at the end.
    """
    report = report_of(model)
    seconds: dict[tuple[str, str], list[float]] = {}
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    prompts = [list(prompt) for prompt in prompts]
    for repeat in range(repeats + 1):
        for mode in (Numerics.BITWISE, Numerics.FAST):
            patch(model, numerics=mode)
            with Engine(model, numerics=mode) as engine:
                start = time.perf_counter()
                engine.generate(prompts, params)
                generated = time.perf_counter() - start
            start = time.perf_counter()
            loss = -torch.cat(token_logprobs(model, prompts)).mean()
            loss.backward()
            trained = time.perf_counter() - start
            model.zero_grad(set_to_none=True)
            if repeat:  # the first repeat is a warm-up
                seconds.setdefault(("generate", mode), []).append(generated)
                seconds.setdefault(("train", mode), []).append(trained)
    unpatch(model)
    if report is not None:
        patch(model, numerics=report.numerics)
    median = {key: sorted(values)[len(values) // 2] for key, values in seconds.items()}
    return Overhead(
        median["generate", Numerics.BITWISE],
        median["generate", Numerics.FAST],
        median["train", Numerics.BITWISE],
        median["train", Numerics.FAST],
    )
