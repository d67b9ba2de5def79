"""Decode steps with weights of fewer bits on SmolLM2-135M's shape: ``python -m benchmarks.low_precision``.

Every side is a separate engine on the same random weights, bitwise mode; they take turns of a few steps. Formats
round the layers' weights, and the head, which is the embedding, unless ``--dense-head`` is given. Activations are not
rounded. A step cannot take less than reading its weights once, at the rate of a sum over float32 in the same run.
"""

import argparse
import gc
from statistics import median
from typing import Any

import torch

import toolkit
from benchmarks.common import print_table, write_json
from benchmarks.end_to_end.decode import new_engine, read_rate, timed_steps
from benchmarks.end_to_end.narrow import smollm2
from toolkit.engine.memory_plan import weight_bytes

SIDES = ("float32", "bfloat16", "int8", "int4", "nf4", "fp8")


def model_of(side: str, layers: int, dense_head: bool) -> Any:
    """The patched model of one side."""
    torch.manual_seed(0)
    dtype, _, format = side.partition("+")
    if dtype not in ("float32", "bfloat16"):
        dtype, format = "float32", dtype
    model = smollm2(torch.float32, layers).to(getattr(torch, dtype)).eval()
    if format:
        toolkit.quantise(model, format, exclude=None if dense_head else [])
    toolkit.patch(model, numerics="bitwise")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), help="float32, bfloat16, a format, or bfloat16+nf4")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dense-head", action="store_true", help="leave embedding and head as they are")
    parser.add_argument("--json", help="name of the file under benchmarks/results; no file without it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rate = read_rate(1 << 29)
    sides = ["float32", *(side for side in arguments.sides if side != "float32")]
    models = {side: model_of(side, arguments.layers, arguments.dense_head) for side in sides}
    gc.collect()
    rows, found = [], []
    for batch in arguments.batch:
        engines = {side: new_engine(model, batch, arguments.repeats) for side, model in models.items()}
        seconds = timed_steps(engines, batch, arguments.repeats)
        base = median(seconds["float32"])
        for side, model in models.items():
            size, took = weight_bytes(model), median(seconds[side])
            rows.append([side, batch, 1e3 * took, f"{base / took:.2f}x", size / 2**20, 1e3 * size / rate])
            found.append({"side": side, "batch": batch, "seconds": seconds[side], "ratio": base / took, "bytes": size})
    header = ["weights", "batch", "ms a step", "float32 / it", "MiB", "reading ms"]
    print_table("a decode step of SmolLM2-135M's shape", header, rows)
    if arguments.json:
        print(f"written to {write_json(arguments.json, {'read_bytes_per_s': rate, 'steps': found})}")


if __name__ == "__main__":
    main()
