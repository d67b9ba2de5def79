"""Generation: the engine, in both numerics modes, against transformers' ``generate`` and ``generate_batch``.

``python -m benchmarks.serve`` checks greedy tokens first and reports no speed when they differ by more than
near ties. ``--profile`` prints where a decode step goes instead.
"""

import argparse
import copy
import cProfile
import pstats
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import toolkit
from benchmarks.common import MODELS, interleaved, print_table, summary, write_json

# Two top logits closer than this (in float32, of a model whose logits are of order 1) count as a tie.
NEAR_TIE = 1e-4


def make_prompts(count: int, length: int, vocabulary: int, seed: int = 1) -> list[list[int]]:
    """Random token ids; the same ones for every system."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (count, length), generator=generator).tolist()


class Generate:
    """Stock ``model.generate``: one rectangular batch, greedy."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self.model.device)
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            )  # fmt: skip
        return out[:, ids.shape[1] :].tolist()


class GenerateBatch:
    """Stock continuous batching: ``model.generate_batch``, greedy."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        out = self.model.generate_batch(inputs=prompts, generation_config=config)
        results = sorted(out.values(), key=lambda result: int(result.request_id.rsplit("_", 1)[-1]))
        return [list(result.generated_tokens) for result in results]


class Engine:
    """The engine on a patched copy of the model, greedy, prefix cache off: every prompt is computed."""

    def __init__(self, model: Any, max_num_seqs: int, length: int, numerics: str = "bitwise") -> None:
        toolkit.patch(model, numerics=numerics)
        self.engine = toolkit.Engine(
            model,
            max_num_seqs=max_num_seqs,
            max_model_len=length,
            max_num_batched_tokens=4096,
            enable_prefix_caching=False,
        )

    def __call__(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        params = toolkit.SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        return [list(completion.token_ids) for completion in self.engine.generate(prompts, params)]


def compare(model: Any, prompts: list[list[int]], got: list[list[int]], expected: list[list[int]]) -> dict[str, int]:
    """Equal sequences, sequences that part at a near tie of the stock model's logits, and real mismatches."""
    counts = {"equal": 0, "near_ties": 0, "mismatches": 0}
    for prompt, mine, theirs in zip(prompts, got, expected, strict=True):
        if mine == theirs:
            counts["equal"] += 1
            continue
        shared = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), None)
        if shared is None or len(mine) != len(theirs):
            counts["mismatches"] += 1
            continue
        with torch.no_grad():
            ids = torch.tensor([prompt + theirs[:shared]], device=model.device)
            logits = model(input_ids=ids).logits[0, -1].float()
        margin = abs(float(logits[mine[shared]] - logits[theirs[shared]]))
        counts["near_ties" if margin < NEAR_TIE else "mismatches"] += 1
    return counts


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Gate, then timings at every batch size; raises SystemExit when the gate fails."""
    stock = MODELS[arguments.model]()
    patched = copy.deepcopy(stock)
    vocabulary = stock.config.vocab_size
    length, new_tokens = arguments.prompt, arguments.new_tokens
    system = Engine(patched, max(arguments.batch), length + new_tokens)
    fast = Engine(copy.deepcopy(stock), max(arguments.batch), length + new_tokens, numerics="fast")
    generate = Generate(stock)
    result: dict[str, Any] = {
        "model": arguments.model,
        "prompt": length,
        "new_tokens": new_tokens,
        "batches": {},
    }
    rows = []
    for batch in arguments.batch:
        prompts = make_prompts(batch, length, vocabulary)
        gate = compare(stock, prompts, system(prompts, new_tokens), generate(prompts, new_tokens))
        if gate["mismatches"]:
            print(f"the gate failed at batch {batch}: greedy tokens differ from generate's: {gate}", file=sys.stderr)
            raise SystemExit(1)
        print(f"gate passed at batch {batch}: {gate['equal']} equal, {gate['near_ties']} near ties", flush=True)
        calls = {
            "toolkit": lambda p=prompts: system(p, new_tokens),
            "toolkit, fast": lambda p=prompts: fast(p, new_tokens),
            "generate": lambda p=prompts: generate(p, new_tokens),
        }
        timings = {name: summary(t) for name, t in interleaved(calls, arguments.repeats, warmup=0).items()}
        speed = {name: batch * new_tokens / t["median_s"] for name, t in timings.items()}
        entry = {"gate": gate, "timings": timings, "tokens_per_s": speed}
        ratio = speed["toolkit"] / speed["generate"]
        rows.append(["toolkit.Engine", batch, new_tokens, speed["toolkit"], f"{ratio:.2f}x", gate["near_ties"]])
        ratio = speed["toolkit, fast"] / speed["generate"]
        rows.append(["toolkit.Engine, fast", batch, new_tokens, speed["toolkit, fast"], f"{ratio:.2f}x", ""])
        rows.append(["generate", batch, new_tokens, speed["generate"], "1.00x", ""])
        if arguments.generate_batch and batch == max(arguments.batch):
            entry["generate_batch"] = other = measure_generate_batch(stock, system, prompts, arguments.generate_batch)
            speed = {name: batch * other["new_tokens"] / seconds for name, seconds in other["seconds"].items()}
            ratio = f"engine is {speed['toolkit'] / speed['generate_batch']:.1f}x"
            rows.append(["generate_batch", batch, other["new_tokens"], speed["generate_batch"], ratio, ""])
        result["batches"][str(batch)] = entry
    title = f"{arguments.model}, fp32, prompts {length}, {torch.get_num_threads()} threads, greedy"
    print_table(title, ["system", "batch", "new tokens", "tok/s", "over generate", "near ties"], rows)
    return result


def measure_generate_batch(
    stock: Any, system: Callable[..., Any], prompts: list[list[int]], new_tokens: int
) -> dict[str, Any]:
    """Seconds of ``generate_batch`` and of the engine on the same work, with fewer new tokens: it is slow on CPU."""
    other = GenerateBatch(copy.deepcopy(stock))
    other(prompts[:1], 2)
    calls = {"toolkit": lambda: system(prompts, new_tokens), "generate_batch": lambda: other(prompts, new_tokens)}
    seconds = {name: statistics.median(times) for name, times in interleaved(calls, 3, warmup=0).items()}
    return {"new_tokens": new_tokens, "seconds": seconds}


def profile(arguments: argparse.Namespace) -> None:
    """Milliseconds of a decode step: by operator (torch.profiler) and by part of the Python (cProfile)."""
    model = MODELS[arguments.model]()
    steps = arguments.profile_steps
    for batch in arguments.batch:
        length = arguments.prompt + 4 * steps + 8
        with toolkit.Engine(model, max_num_seqs=batch, max_model_len=length, max_num_batched_tokens=4096) as engine:
            params = toolkit.SamplingParams(max_tokens=4 * steps + 8, temperature=0.0, ignore_eos=True)
            for prompt in make_prompts(batch, arguments.prompt, model.config.vocab_size):
                engine.submit(prompt, params)
            started: set[Any] = set()
            while len(started) < batch:
                started |= {delta.request_id for delta in engine.step()}
            engine.step()
            plain = []
            for _ in range(steps):
                start = time.perf_counter()
                engine.step()
                plain.append(time.perf_counter() - start)
            step_ms = statistics.median(plain) * 1e3
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as traced:
                for _ in range(steps):
                    engine.step()
            recorder = cProfile.Profile()
            recorder.runcall(lambda: [engine.step() for _ in range(steps)])
        operators = Counter({e.key: e.self_cpu_time_total / 1e3 / steps for e in traced.key_averages()})
        total = sum(operators.values())
        rows: list[list[Any]] = [["decode step, not profiled", step_ms, "", ""]]
        rows += [[name, ms, f"{ms / step_ms:.0%}", "operator"] for name, ms in operators.most_common(12)]
        rows.append(["all operators", total, f"{total / step_ms:.0%}", "operator"])
        rows.append(
            [
                "the rest: Python and dispatch",
                max(step_ms - total, 0.0),
                f"{max(1 - total / step_ms, 0):.0%}",
                "",
            ]
        )
        parts = _python_parts(recorder, steps)
        share = sum(parts.values())
        rows += [[name, ms, f"{ms / share:.0%}", "of cProfile's time"] for name, ms in parts.most_common(12)]
        print_table(
            f"{arguments.model}, batch {batch}: where a decode step goes",
            ["part", "ms", "share", "kind"],
            rows,
        )


def _python_parts(recorder: cProfile.Profile, steps: int) -> Counter[str]:
    """Own time of functions by the part of the code they stand in, ms a step (inflated by cProfile)."""
    parts: Counter[str] = Counter()
    root = Path(toolkit.__file__).parent
    stats: Any = pstats.Stats(recorder)
    for (file, _, function), (_, _, own, _, _) in stats.stats.items():
        path = Path(file)
        if file == "~":
            name = "operator calls" if "torch" in function or "_VariableFunctions" in function else "builtins"
        elif path.is_relative_to(root):
            name = "toolkit/" + "/".join(path.relative_to(root).parts[:2])
        else:
            name = next((p for p in ("transformers", "torch") if p in path.parts), "other Python")
        parts[name] += own * 1e3 / steps
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="llama")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--generate-batch", type=int, default=16, help="its new tokens; 0 leaves it out")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--profile-steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.profile:
        profile(arguments)
        return
    path = write_json(f"serve-{arguments.model}", run(arguments))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
