"""A LoRA step on a base in NF4 beside one in bfloat16 and bitsandbytes' on a CPU: ``python -m benchmarks.qlora``.

SmolLM2-135M's shape, random weights, adapters of rank 16 on every linear layer, one sequence, AdamW; sides take turns.
Weight bytes are those of the base. The curve: losses of as many steps on NF4 and on the dense weights that it stands
for, on the same batches in float32. bitsandbytes' side is left out where the package is not installed.
"""

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

import toolkit
from benchmarks.common import print_table, turns, write_json
from benchmarks.end_to_end.narrow import smollm2
from toolkit.engine.memory_plan import weight_bytes
from toolkit.quantised import dequantise


def adapted(model: Any) -> Any:
    """The model with LoRA adapters, which are trained."""
    import peft

    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).train()


def with_bitsandbytes(model: Any) -> None:
    """Linear layers but the head as bitsandbytes' ``Linear4bit``: NF4, double quantisation."""
    import bitsandbytes

    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=module.weight.dtype,
                quant_type="nf4", compress_statistics=True,
            )  # fmt: skip
            layer.weight = bitsandbytes.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.to("cpu"))


class Side:
    """One way to train adapters on the same weights."""

    def __init__(self, name: str, layers: int) -> None:
        model = smollm2(torch.bfloat16, layers)
        if name == "nf4":
            toolkit.quantise(model, "nf4")
        elif name == "bitsandbytes nf4":
            with_bitsandbytes(model)
        self.base_bytes = weight_bytes(model)
        self.model = adapted(model)
        if name != "bitsandbytes nf4":
            toolkit.patch(self.model)
        self.step = stepper(self.model)


def stepper(model: Any) -> Callable[[torch.Tensor], float]:
    """One step on a batch of ids; its loss."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)

    def step(ids: torch.Tensor) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def curves(layers: int, steps: int, length: int) -> list[list[float]]:
    """Losses on NF4, and on the dense weights of the same values."""
    model = smollm2(torch.float32, layers)
    toolkit.quantise(model, "nf4")
    dense = copy.deepcopy(model)
    dequantise(dense)
    sides = [adapted(one) for one in (model, dense)]
    for one in sides:
        toolkit.patch(one)
    calls = [stepper(one) for one in sides]
    source = torch.Generator().manual_seed(1)
    batches = torch.randint(0, 64, (8, 1, length), generator=source)  # few, so that they are learned
    return [[call(batches[at % len(batches)]) for at in range(steps)] for call in calls]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--curve-layers", type=int, default=2)
    parser.add_argument("--curve-steps", type=int, default=200)
    parser.add_argument("--curve-length", type=int, default=32)
    parser.add_argument("--json", help="name of the file under benchmarks/results; no file without it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = ["bfloat16", "nf4"]
    if importlib.util.find_spec("bitsandbytes") is not None:
        names.append("bitsandbytes nf4")
    sides = {name: Side(name, arguments.layers) for name in names}
    ids = torch.randint(0, 49152, (1, arguments.length), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses = {name: side.step(ids) for name, side in sides.items()}  # warms up, too
    for name in turns(names, arguments.repeats):
        begun = time.process_time()
        sides[name].step(ids)
        seconds[name].append(time.process_time() - begun)
    base, size = median(seconds["bfloat16"]), sides["bfloat16"].base_bytes
    rows = [
        [name, median(seconds[name]), f"{median(seconds[name]) / base:.2f}x", side.base_bytes / 2**20,
         f"{side.base_bytes / size:.2f}x", losses[name]]
        for name, side in sides.items()
    ]  # fmt: skip
    print_table(
        "a LoRA step", ["base", "CPU s a step", "to bfloat16", "weights MiB", "to bfloat16", "first loss"], rows
    )
    coded, dense = curves(arguments.curve_layers, arguments.curve_steps, arguments.curve_length)
    furthest = max(abs(one - other) / other for one, other in zip(coded, dense, strict=True))
    print(
        f"{len(coded)} steps on NF4 and on its dense weights: loss {coded[0]:.4f} to {coded[-1]:.4f}, largest relative "
        f"difference {furthest:.2e}"
    )
    if furthest > 0.01:
        raise SystemExit("the curves differ by more than 1 %")
    if arguments.json:
        write_json(arguments.json, {"seconds": seconds, "bytes": {name: one.base_bytes for name, one in sides.items()},
                                    "curve": coded, "furthest": furthest})  # fmt: skip


if __name__ == "__main__":
    main()
