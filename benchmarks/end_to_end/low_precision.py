"""Decode steps with weights, or keys and values, of fewer bits: ``python -m benchmarks.low_precision``.

Every side is a separate engine on the same random weights, bitwise mode; they take turns of a few steps. Formats
round the layers' weights, and the head, which is the embedding, unless ``--dense-head`` is given. Activations are not
rounded. A step cannot take less than reading its weights once, at the rate of a sum over float32 in the same run.
``--sides float32 float32@int8 --prompt 4096`` compares keys and values of float32 with those in eight bits;
``--model qwen3_moe`` is an MoE model of 64 experts, 8 per token, instead of SmolLM2-135M's shape.
"""

import argparse
import gc
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

import toolkit
from benchmarks.common import print_table, qwen3_moe, write_json
from benchmarks.end_to_end.decode import new_engine, read_rate, timed_steps
from benchmarks.end_to_end.narrow import smollm2
from toolkit.engine.memory_plan import weight_bytes

SIDES = ("float32", "bfloat16", "int8", "int4", "nf4", "fp8")


def moe(layers: int) -> Any:
    """A Qwen3-MoE of 64 experts of 512, 8 per token, and random weights."""
    return qwen3_moe(num_hidden_layers=layers, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=512).eval()


MODELS: dict[str, tuple[Callable[[int], Any], int]] = {
    "smollm2": (partial(smollm2, torch.float32), 30),
    "qwen3_moe": (moe, 10),
}
"""Of a name the model with so many layers, and how many it has."""


def model_of(name: str, side: str, layers: int, dense_head: bool) -> Any:
    """The patched model of one side."""
    torch.manual_seed(0)
    weights, _, kept = side.partition("@")
    dtype, _, format = weights.partition("+")
    if dtype not in ("float32", "bfloat16"):
        dtype, format = "float32", dtype
    model = MODELS[name][0](layers).to(getattr(torch, dtype)).eval()
    if format:
        toolkit.quantise(model, format, exclude=None if dense_head else ["*.gate"])
    toolkit.patch(model, numerics="bitwise", kv_cache_dtype=kept or "auto")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sides", nargs="+", default=list(SIDES), help="float32, bfloat16, a format, or bfloat16+nf4; @int8: keys"
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    parser.add_argument("--prompt", type=int, default=64, help="tokens before the first step")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the model has")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dense-head", action="store_true", help="leave embedding and head as they are")
    parser.add_argument("--json", help="name of the file under benchmarks/results; no file without it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rate = read_rate(1 << 29)
    sides = ["float32", *(side for side in arguments.sides if side != "float32")]
    layers = arguments.layers or MODELS[arguments.model][1]
    models = {side: model_of(arguments.model, side, layers, arguments.dense_head) for side in sides}
    gc.collect()
    rows, found = [], []
    for batch in arguments.batch:
        engines = {
            side: new_engine(model, batch, arguments.repeats, arguments.prompt) for side, model in models.items()
        }
        seconds = timed_steps(engines, batch, arguments.repeats, arguments.prompt)
        base = median(seconds["float32"])
        for side, model in models.items():
            size, took = weight_bytes(model), median(seconds[side])
            rows.append([side, batch, 1e3 * took, f"{base / took:.2f}x", size / 2**20, 1e3 * size / rate])
            found.append({"side": side, "batch": batch, "seconds": seconds[side], "ratio": base / took, "bytes": size})
    header = ["weights", "batch", "ms a step", "float32 / it", "MiB", "reading ms"]
    print_table(f"a decode step of {arguments.model} behind {arguments.prompt} tokens", header, rows)
    if arguments.json:
        print(f"written to {write_json(arguments.json, {'read_bytes_per_s': rate, 'steps': found})}")


if __name__ == "__main__":
    main()
