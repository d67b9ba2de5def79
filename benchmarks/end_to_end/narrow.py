"""16-bit models on a CPU: prefill, decoding and a training step of SmolLM2-135M's shape, and their peers.

``python -m benchmarks.narrow`` takes turns, so that a noisy neighbour slows all of them, and reports each one's median.
Random weights: what a step costs does not depend on them.
"""

import argparse
import os
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import toolkit
from benchmarks.common import CLOCKS, print_table, turns, write_json
from toolkit.ops import native

PROMPT = 128
BATCH = 16
SHORT = 32  # tokens of a prompt of a batch


def smollm2(dtype: torch.dtype, layers: int) -> Any:
    """A Llama of the shape of SmolLM2-135M with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config: Any = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    return model.to(dtype).eval()


class System:
    """One model as one library runs it."""

    def __init__(self, library: str, dtype: torch.dtype, layers: int) -> None:
        self.model = smollm2(dtype, layers)
        self.engine: toolkit.Engine | None = None
        if library == "toolkit":
            toolkit.patch(self.model)
            self.engine = toolkit.Engine(self.model, enable_prefix_caching=False)

    def generate(self, prompt: list[int], count: int, batch: int = 1) -> None:
        """Greedy decoding of ``count`` tokens in each of ``batch`` sequences."""
        if self.engine is not None:
            params = toolkit.SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
            self.engine.generate([prompt] * batch, params)
            return
        with torch.inference_mode():
            ids = torch.tensor([prompt] * batch)
            self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                max_new_tokens=count, min_new_tokens=count,
            )  # fmt: skip

    def train(self, prompt: list[int]) -> None:
        """Forward and backward of one sequence."""
        ids = torch.tensor([prompt])
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.model.zero_grad()


def seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="process: of a busy machine, one thread")
    parser.add_argument("--json", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    clock = CLOCKS[options.clock]
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    systems = {
        f"{library} {name}": System(library, dtype, options.layers)
        for library in ("toolkit", "transformers")
        for name, dtype in dtypes.items()
    }
    prompt = torch.randint(0, 49152, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    times: dict[str, list[list[float]]] = {name: [] for name in systems}
    for name in turns(systems, options.repeats + 1):  # the first turn warms up
        system = systems[name]
        calls = (
            lambda system=system: system.generate(prompt, 1),
            lambda system=system: system.generate(prompt, 1 + options.new_tokens),
            lambda system=system: system.generate(prompt[:SHORT], 1, BATCH),
            lambda system=system: system.generate(prompt[:SHORT], 1 + options.new_tokens, BATCH),
            lambda system=system: system.train(prompt),
        )
        times[name].append([seconds(call, clock) for call in calls])
    medians = {name: [median(one) for one in zip(*rows[1:], strict=True)] for name, rows in times.items()}
    speeds = {
        name: {
            "prefill_tokens_per_second": PROMPT / first,
            "decode_tokens_per_second": options.new_tokens / (whole - first),
            f"decode_tokens_per_second_of_{BATCH}": BATCH * options.new_tokens / (whole_batch - first_batch),
            "train_tokens_per_second": PROMPT / step,
        }
        for name, (first, whole, first_batch, whole_batch, step) in medians.items()
    }
    ours = speeds["toolkit bfloat16"]
    print_table(
        f"SmolLM2-135M's shape on the CPU, medians by the {options.clock} clock, GEMMs in bfloat16: "
        f"{native.family(torch.bfloat16)}; in brackets what toolkit reaches in bfloat16 over it",
        ["system", "prefill tok/s", "decode tok/s", f"decode tok/s of {BATCH}", "train tok/s"],
        [
            [name, *(f"{value:.1f} ({ours[key] / value:.2f}x)" for key, value in values.items())]
            for name, values in speeds.items()
        ],
    )
    if options.json is not None:
        load = os.getloadavg()[0]
        write_json(options.json, {"load": load, "prompt": PROMPT, "results": speeds})


if __name__ == "__main__":
    main()
