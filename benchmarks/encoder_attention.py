"""A tower's layer with role ``encoder_attention`` against the same layer with torch's attention, on the CPU.

``python -m benchmarks.encoder_attention [--tokens N ...] [--threads N] [--repeats N] [--json NAME]``: the median
seconds of a forward, and of a forward and backward, of one SigLIP-so400m layer (hidden size 1,152, 16 heads) in
float32 and bfloat16. The two take turns, and process time is counted, so that a busy machine slows each equally.
Outputs and gradients in float32 must agree with torch's.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

import toolkit
from benchmarks.common import print_table, relative_error, turns, write_json

SIDES = {"sdpa": ["norm", "linear"], "toolkit": ["norm", "linear", "encoder_attention"]}
LIMIT = 1e-5


def layer_of(sizes: argparse.Namespace, dtype: torch.dtype, side: str) -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=sizes.hidden_size, intermediate_size=sizes.intermediate_size, num_attention_heads=sizes.heads,
        num_hidden_layers=1, image_size=32, patch_size=16, vision_use_head=False,
    )  # fmt: skip
    model: Any = SiglipVisionModel(config)
    model.to(dtype)
    toolkit.patch(model, SIDES[side], numerics="bitwise")
    return next(module for module in model.modules() if type(module).__name__ == "SiglipEncoderLayer")


def step(layer: nn.Module, x: Tensor, cotangent: Tensor) -> tuple[float, float, list[Tensor]]:
    """Seconds of process time of the forward, and of both ways; outputs and gradients."""
    layer.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    begun = time.process_time()
    output = layer(leaf, None)
    forward = time.process_time() - begun
    output.backward(cotangent)
    both = time.process_time() - begun
    assert leaf.grad is not None
    # A gradient of the keys' bias is 0 up to rounding: a softmax does not see what all keys share.
    own = [p.grad for name, p in layer.named_parameters() if p.grad is not None and "k_proj.bias" not in name]
    return forward, both, [output.detach(), leaf.grad, *own]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[729, 2304])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="name of a file in benchmarks/results")
    for name, size in {"hidden-size": 1152, "intermediate-size": 4304, "heads": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    sizes = parser.parse_args()
    torch.set_num_threads(sizes.threads)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        layers = {side: layer_of(sizes, dtype, side) for side in SIDES}
        for tokens in sizes.tokens:
            generator = torch.Generator().manual_seed(tokens)
            x, cotangent = (torch.randn(1, tokens, sizes.hidden_size, generator=generator).to(dtype) for _ in range(2))
            warm = {side: step(layer, x, cotangent)[2] for side, layer in layers.items()}
            error = max(map(relative_error, warm["toolkit"], warm["sdpa"]))
            if dtype == torch.float32 and not error <= LIMIT:
                raise RuntimeError(f"The relative error to torch's attention must be <= {LIMIT:.0e}, got {error:.1e}.")
            times: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
            for side in turns(SIDES, sizes.repeats):
                times[side].append(step(layers[side], x, cotangent)[:2])
            for at, what in enumerate(("forward", "forward and backward")):
                torchs, ours = (statistics.median(one[at] for one in times[side]) for side in SIDES)
                rows.append([str(dtype).removeprefix("torch."), tokens, what, torchs, ours, ours / torchs])
    header = ["dtype", "tokens", "what", "torch s", "toolkit s", "ratio"]
    print_table("one tower layer, process time", header, rows)
    if sizes.json:
        write_json(sizes.json, {"sizes": vars(sizes), "rows": [dict(zip(header, row, strict=True)) for row in rows]})


if __name__ == "__main__":
    main()
