"""Greedy decoding of one sequence in float32 beside llama.cpp's F32, in one process, in turns.

``python -m benchmarks.llama_cpp FOLDER FILE``: a checkpoint folder and its F32 GGUF file (``toolkit export FOLDER OUT
--to gguf``). Needs the package xllamacpp. Tokens per second of decoding alone, medians and ratio; the limit is one read
of the weights a token, at the rate of a sum over as many bytes.
"""

import argparse
import json
import time
import urllib.request
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import toolkit
from benchmarks.common import print_table, turns
from benchmarks.end_to_end.decode import read_rate

PROMPT = list(range(100, 132))


def server(file: Path, threads: int) -> Any:
    """llama.cpp's server on ``file``."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.port, settings.verbosity = 0, 0
    settings.n_ctx, settings.n_parallel, settings.fit_params = 512, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(settings)


def theirs(address: str, tokens: int) -> float:
    """Tokens per second of llama.cpp by its own clock, the prompt not counted."""
    body = {"prompt": PROMPT, "n_predict": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return float(json.load(response)["timings"]["predicted_per_second"])


def ours(engine: toolkit.Engine, tokens: int) -> float:
    """Tokens per second of the engine, the prompt not counted."""
    engine.submit(PROMPT, toolkit.SamplingParams(max_tokens=tokens + 1, temperature=0.0, ignore_eos=True))
    engine.step()
    begun, count = time.perf_counter(), 0
    while engine.has_work:
        count += len(engine.step())
    return count / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32).eval()
    engine = toolkit.Engine(model, max_num_seqs=1, max_model_len=512)
    peer = server(arguments.file, arguments.threads)  # it ends with this reference
    sides = {"toolkit": partial(ours, engine), "llama.cpp": partial(theirs, peer.listening_address)}
    found: dict[str, list[float]] = {side: [] for side in sides}
    for side in turns(sides, arguments.repeats + 1):
        found[side].append(sides[side](arguments.tokens))
    medians = {side: median(rates[1:]) for side, rates in found.items()}  # the first is a warm-up
    size = sum(parameter.nbytes for parameter in model.parameters())
    limit = read_rate(size) / size
    ratio = medians["toolkit"] / medians["llama.cpp"]
    rows = [[medians["toolkit"], medians["llama.cpp"], f"{ratio:.2f}x", limit]]
    print_table("decoding one sequence, fp32", ["toolkit tok/s", "llama.cpp tok/s", "ratio", "limit tok/s"], rows)
    engine.close()


if __name__ == "__main__":
    main()
