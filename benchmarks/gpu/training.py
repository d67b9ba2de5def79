"""Training steps of four layers of a Qwen3-4B on a GPU: patched against stock, compiled stock and Liger's patches.

And a GRPO update on a prefix tree: a group of completions of one prompt, the prompt computed once.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import toolkit
from benchmarks.common import interleaved, print_table, summary
from benchmarks.gpu.decode import WHOLE, make_model
from benchmarks.gpu.device import DEVICE, DRY, compiled, peak
from benchmarks.gpu.section import Section

# A few layers: large enough to fill the device, few enough to leave time.
SHALLOW = WHOLE | {"num_hidden_layers": 1 if DRY else 4}
ROWS, LENGTH = (1, 4) if DRY else (4, 2048)
GROUP, PROMPT, COMPLETION = (2, 4, 2) if DRY else (16, 2048, 256)
REPEATS = 8


def times(calls: dict[str, Callable[..., Any]]) -> dict[str, dict[str, float]]:
    """Median, least and most seconds of each, in turns; dry: of one call."""
    taken = interleaved(calls, 1, 0) if DRY else interleaved(calls, REPEATS, 2, synchronize=True)
    return {name: summary(values) for name, values in taken.items()}


def liger(model: Any) -> Any:
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3

    apply_liger_kernel_to_qwen3(model=model)
    return model


def patched(numerics: str) -> Callable[[Any], Any]:
    def apply(model: Any) -> Any:
        toolkit.patch(model, numerics=numerics)
        return model

    return apply


def bench_training(section: Section) -> None:
    """A bf16 step of forward, backward and AdamW: seconds, and peak bytes above weights and optimizer state."""
    stock = make_model(**SHALLOW).train()
    sides: dict[str, Callable[[Any], Any]] = {
        "patched, fast": patched("fast"),
        "patched, bitwise": patched("bitwise"),
        "stock": lambda model: model,
        "stock, torch.compile": lambda model: compiled(model),
        "liger": liger,
    }
    ids = torch.randint(0, SHALLOW["vocab_size"], (ROWS, LENGTH), device=DEVICE)
    losses: dict[str, float] = {}
    steps: dict[str, Callable[..., None]] = {}
    result = section.result
    result |= {"tokens": ROWS * LENGTH, "losses": losses, "peak_above_state_bytes": {}, "missing": []}
    for name, maker in sides.items():
        if not section.allows(name, 4.0):
            continue
        with section.trying(name):
            try:
                model = maker(copy.deepcopy(stock))
            except ImportError:
                result["missing"].append(name)
                continue
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=not DRY)

            def step(name: str = name, model: Any = model, optimizer: Any = optimizer) -> None:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.setdefault(name, float(loss.detach()))

            step()
            result["peak_above_state_bytes"][name] = peak(step)
            steps[name] = step
    for name, loss in losses.items():
        near = abs(loss - losses["stock"]) < 1e-2 * abs(losses["stock"])
        section.expect(name, near, f"the first loss must be within 1 % of {losses['stock']}, got {loss}")
    section.write()
    result["timings"] = times(steps)


def bench_grpo(section: Section) -> None:
    """Forward and backward of a group's log-probabilities: as a prefix tree, unshared, and of the unpatched model."""
    stock = make_model(**SHALLOW).train()
    generator = torch.Generator().manual_seed(4)
    prompt = torch.randint(SHALLOW["vocab_size"], (PROMPT,), generator=generator).tolist()
    completions = torch.randint(SHALLOW["vocab_size"], (GROUP, COMPLETION), generator=generator).tolist()
    samples = [[*prompt, *one] for one in completions]
    last = [COMPLETION] * GROUP
    values: dict[str, Tensor] = {}
    model = patched("bitwise")(copy.deepcopy(stock))

    def of_patched(share: bool) -> Callable[[], None]:
        def step() -> None:
            logprobs = torch.stack(toolkit.token_logprobs(model, samples, share, last))
            logprobs.mean().backward()
            values.setdefault("tree" if share else "unshared", logprobs.detach())

        return step

    def unpatched() -> None:
        parts = []
        for ids in torch.tensor(samples, device=DEVICE).split(4):
            logits = stock(ids, logits_to_keep=COMPLETION + 1, use_cache=False).logits[:, :-1]
            logprobs = logits.float().log_softmax(-1).gather(2, ids[:, -COMPLETION:, None])[..., 0]
            (logprobs.sum() / (GROUP * COMPLETION)).backward()
            parts.append(logprobs.detach())
        values.setdefault("unpatched", torch.cat(parts))

    steps = {"tree": of_patched(True), "unshared": of_patched(False), "unpatched, 4 rows a micro-batch": unpatched}
    section.result |= {"peak_bytes": {name: peak(step) for name, step in steps.items()}}
    section.write()
    equal = torch.equal(values["tree"], values["unshared"])
    section.expect("tree", equal, "the log-probabilities of the prefix tree must be those of unshared rows, bit by bit")
    near = float((values["tree"] - values["unpatched"]).abs().max())
    section.expect("tree", near < 0.2, f"a log-probability is {near:.2g} nats from the unpatched model's")
    section.result["timings"] = times(steps)


def show_training(result: dict[str, Any], ceilings: dict[str, float]) -> None:
    memory = result["peak_above_state_bytes"]
    rows = [
        [side, t["median_s"] * 1e3, result["tokens"] / t["median_s"], memory[side] / 2**30]
        for side, t in result["timings"].items()
    ]
    rows += [[side, "missing", "", ""] for side in result["missing"]]
    title = f"Training step, bf16 Qwen3, {SHALLOW['num_hidden_layers']} layers, {ROWS} x {LENGTH}"
    print_table(title, ["side", "ms", "tok/s", "peak GiB above state"], rows)


def show_grpo(result: dict[str, Any], ceilings: dict[str, float]) -> None:
    rows = [[side, t["median_s"] * 1e3, result["peak_bytes"][side] / 2**30] for side, t in result["timings"].items()]
    title = f"GRPO update, {GROUP} completions of {COMPLETION} on a prompt of {PROMPT}"
    print_table(title, ["side", "ms", "peak GiB"], rows)
