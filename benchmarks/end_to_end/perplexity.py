"""Perplexity in each weight format, beside other quantisers: ``python -m benchmarks.perplexity FOLDER``.

Source files of the standard library, windows of equal length, every token after a window's first; linear layers but the
head are rounded, activations are not, arithmetic is float32. "bitsandbytes": its own NF4, dequantised (where it is
installed). "gguf": the formats that ``toolkit export`` writes for llama.cpp, by llama.cpp's own quantiser (libgguf) or
gguf's, dequantised; rows that 256 does not divide have Q5_0 for Q4_K.
"""

import argparse
import copy
import importlib.util
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import toolkit
from benchmarks.common import print_table, write_json
from toolkit.exporting.gguf.formats import encoded, ggml_type, tensor_format
from toolkit.loading import load_model

FILES = ("argparse.py", "statistics.py", "textwrap.py", "heapq.py")
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}),
    "q8_0": ("q8_0", {}),
    "fp8": ("fp8", {}),
    "int4, groups of 32": ("int4", {"group": 32}),
    "int4, groups of 32, symmetric": ("int4", {"group": 32, "symmetric": True}),
    "int4, groups of 128": ("int4", {"group": 128}),
    "nf4": ("nf4", {}),
}


def windows(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """``count`` windows of ``length`` tokens of the standard library's source."""
    folder = Path(argparse.__file__).parent
    text = "\n".join((folder / name).read_text(encoding="utf-8") for name in FILES)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < count * length:
        raise SystemExit(f"count * length must be <= {len(ids)} tokens, got {count * length}")
    return [ids[at * length : (at + 1) * length] for at in range(count)]


def of_bitsandbytes(weight: Tensor) -> Tensor:
    import bitsandbytes.functional as library

    codes, state = library.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return library.dequantize_4bit(codes, state)


def of_gguf(kind: str) -> Callable[[Tensor], Tensor]:
    """Rounds to a format of GGUF files and back, as an export does."""
    import gguf

    def round_trip(weight: Tensor) -> Tensor:
        form = tensor_format("layer", tuple(weight.shape), kind, False)
        return torch.from_numpy(gguf.dequantize(encoded(weight, form), ggml_type(form))).view(weight.shape)

    return round_trip


def others() -> dict[str, Callable[[Tensor], Tensor]]:
    """What other quantisers make of a weight, by name; of those that are installed."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    if importlib.util.find_spec("bitsandbytes") is not None:
        found["bitsandbytes nf4"] = of_bitsandbytes
    if importlib.util.find_spec("libgguf") is not None and importlib.util.find_spec("gguf") is not None:
        found |= {f"gguf {kind}": of_gguf(kind) for kind in ("q8_0", "q4_k", "q4_0")}
    return found


@torch.no_grad()
def perplexity(model: Any, sequences: list[list[int]]) -> float:
    """exp of the mean negative log-likelihood of all tokens but each sequence's first."""
    toolkit.patch(model)
    found = [toolkit.token_logprobs(model, [one])[0].double() for one in sequences]
    return math.exp(-torch.cat(found).mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="checkpoint")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="name of the file under benchmarks/results; no file without it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(arguments.folder)
    sequences = windows(tokenizer, arguments.windows, arguments.length)
    rows: list[list[Any]] = []

    def measure(name: str, change: Callable[[Any], Any]) -> None:
        begun, one = time.perf_counter(), copy.deepcopy(model)
        change(one)
        found = perplexity(one, sequences)
        base = rows[0][1] if rows else found
        rows.append([name, round(found, 4), f"{100 * (found / base - 1):+.2f} %"])
        print(f"{name}: {found:.4f} ({time.perf_counter() - begun:.0f} s)", flush=True)

    def rounded(round_trip: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
        def change(one: Any) -> None:
            for layer in one.modules():
                if type(layer) is nn.Linear and layer is not one.get_output_embeddings():
                    layer.weight.data = round_trip(layer.weight.data)

        return change

    measure("float32", lambda one: None)
    for name, (format, options) in OURS.items():
        measure(name, partial(toolkit.quantise, format=format, **options))
    for name, round_trip in others().items():
        measure(name, rounded(round_trip))
    print_table("perplexity", ["weights", "perplexity", "to float32"], rows)
    if arguments.json:
        write_json(arguments.json, {"rows": rows, "tokens": arguments.windows * (arguments.length - 1)})


if __name__ == "__main__":
    main()
