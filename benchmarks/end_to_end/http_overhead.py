"""What HTTP costs: the same requests to a server process, streamed and not, and to the engine alone in its process.

CPU seconds of the process that has the engine, by one thread of torch, so that the client's own work and other work on
the machine are not in them; seconds by the clock beside them. Prompts differ from turn to turn: no prefix is cached.
"""

import argparse
import asyncio
import json
import statistics
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import torch

import toolkit
from benchmarks.common import MODELS, clocked, print_table, turns, write_json
from benchmarks.end_to_end.serve import make_prompts
from benchmarks.end_to_end.servers import Server, serving, toolkit_serve

ALONE, WHOLE, STREAMED = "engine alone", "HTTP", "HTTP, streamed"


def words(vocabulary: int) -> Any:
    """A tokenizer with a word for each token id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{at}": at for at in range(vocabulary)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


async def ask(server: Server, prompts: list[list[int]], new_tokens: int, stream: bool) -> int:
    """The completion tokens of all requests, sent at once."""
    body = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    more = {"stream_options": {"include_usage": True}} if stream else {}

    async def one(client: httpx.AsyncClient, prompt: list[int]) -> int:
        asked = {**body, **more, "prompt": prompt}
        if not stream:
            response = (await client.post("/v1/completions", json=asked)).raise_for_status()
            return int(response.json()["usage"]["completion_tokens"])
        last = ""
        async with client.stream("POST", "/v1/completions", json=asked) as response:
            async for line in response.aiter_lines():
                last = line if line.startswith("data: {") else last
        return int(json.loads(last[6:])["usage"]["completion_tokens"])

    limits = httpx.Limits(max_connections=len(prompts))
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as client:
        return sum(await asyncio.gather(*(one(client, prompt) for prompt in prompts)))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Turns of the three; RuntimeError where a side does not return every token."""
    torch.set_num_threads(1)
    model = MODELS[arguments.model]()
    tokenizer = words(model.config.vocab_size)
    streams, new_tokens = arguments.streams, arguments.new_tokens
    length = arguments.prompt + new_tokens + 8
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"wall": [], "process": []} for name in (ALONE, WHOLE, STREAMED)
    }
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        options = ("--max-num-seqs", str(streams), "--max-model-len", str(length), "--max-num-batched-tokens", "4096")
        command = toolkit_serve(folder, arguments.port, *options)
        engine = toolkit.Engine(
            model, tokenizer, max_num_seqs=streams, max_model_len=length, max_num_batched_tokens=4096
        )  # fmt: skip
        params = toolkit.SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        url = f"http://127.0.0.1:{arguments.port}"
        with serving("toolkit", command, url, {"OMP_NUM_THREADS": "1"}) as server:
            for at, name in enumerate([ALONE, WHOLE, STREAMED, *turns(seconds, arguments.repeats)]):
                prompts = make_prompts(streams, arguments.prompt, model.config.vocab_size, seed=at)
                taken: dict[str, list[float]] = {"wall": [], "process": []}
                if name == ALONE:
                    completions = clocked(partial(engine.generate, prompts, params), taken)
                    tokens = sum(len(one.token_ids) for one in completions)
                else:
                    before, began = server.cpu_seconds(), time.perf_counter()
                    tokens = asyncio.run(ask(server, prompts, new_tokens, name == STREAMED))
                    taken["wall"].append(time.perf_counter() - began)
                    taken["process"].append(server.cpu_seconds() - before)
                if tokens != streams * new_tokens:
                    raise RuntimeError(f"{name} returned {tokens} tokens of {streams * new_tokens}.")
                if at >= len(seconds):  # the first turn warms all of them up
                    for clock, found in taken.items():
                        seconds[name][clock] += found
        engine.close()
    rows, measured = [], {}
    for name, clocks in seconds.items():
        medians = {clock: statistics.median(found) for clock, found in clocks.items()}
        base = {clock: statistics.median(found) for clock, found in seconds[ALONE].items()}
        overhead = {clock: medians[clock] / base[clock] - 1 for clock in medians}
        measured[name] = {"seconds": medians, "overhead": overhead}
        rows.append(
            [name, medians["process"], f"{overhead['process']:+.1%}", medians["wall"], f"{overhead['wall']:+.1%}"]
        )
    title = (
        f"{arguments.model}, {streams} requests at once, prompts {arguments.prompt}, {new_tokens} new tokens, 1 thread"
    )
    print_table(title, ["", "CPU s", "over the engine", "wall s", "over the engine"], rows)
    return {
        "model": arguments.model, "streams": streams, "prompt": arguments.prompt, "new_tokens": new_tokens,
        "load": list(Path("/proc/loadavg").read_text().split()[:3]), "measured": measured,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="llama")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=8751)
    parser.add_argument("--json", default="http_overhead", metavar="NAME")
    arguments = parser.parse_args()
    path = write_json(arguments.json, run(arguments))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
