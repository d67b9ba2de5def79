"""Training on one long sequence in chunks: gradients against the direct ones, then peak memory and time.

``python -m benchmarks.long_sequence``: a 10 M Llama, 32,768 tokens; the gradient is compared at 4,096, where the whole
sequence still fits at once.
"""

import argparse
import json
import sys
import time
from typing import Any

import torch

from benchmarks.common import in_fresh_process, peak_rss, print_table, write_json

LIMIT = 1e-5


def make_model(length: int) -> Any:
    """10.2 M parameters: 4 layers, hidden size 384, 6 heads, vocabulary size 4,096."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=6,
        max_position_embeddings=length,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def make_tokens(length: int) -> torch.Tensor:
    return torch.randint(0, 4096, (length,), generator=torch.Generator().manual_seed(1))


def compare(length: int, chunk: int) -> dict[str, Any]:
    """Loss and gradients in chunks against the unpatched model's backward of the whole sequence."""
    import copy

    import toolkit
    from toolkit.training.long_sequence import backward_in_chunks

    stock = make_model(length)
    model = copy.deepcopy(stock)
    toolkit.patch(model)
    tokens = make_tokens(length)
    loss = backward_in_chunks(model, tokens, chunk_tokens=chunk)
    expected = stock(tokens[None], labels=tokens[None], use_cache=False).loss
    expected.backward()
    errors = {
        name: float((mine.grad.double() - own.grad.double()).norm() / own.grad.double().norm())
        for (name, mine), (_, own) in zip(model.named_parameters(), stock.named_parameters())
    }
    worst = max(errors, key=errors.__getitem__)
    difference = abs(loss - float(expected.detach())) / float(expected.detach())
    green = errors[worst] <= LIMIT and difference <= LIMIT
    return {"length": length, "loss_error": difference, "worst": worst, "error": errors[worst], "green": green}


def measure(arguments: argparse.Namespace) -> None:
    """In this process alone; prints JSON as the last line."""
    import toolkit
    from toolkit.training.long_sequence import backward_in_chunks

    model = make_model(arguments.length)
    toolkit.patch(model)
    toolkit.token_logprobs(model, [[1, 2, 3]])
    tokens = make_tokens(arguments.length)
    before, start = peak_rss(), time.perf_counter()
    backward_in_chunks(model, tokens, chunk_tokens=arguments.chunk)
    print(json.dumps({"before": before, "peak": peak_rss(), "seconds": time.perf_counter() - start}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--compare", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        measure(arguments)
        return
    gate = compare(arguments.compare, arguments.chunk)
    print(
        f"gate at {gate['length']} tokens: loss error {gate['loss_error']:.1e}, "
        f"worst gradient error {gate['error']:.1e} ({gate['worst']}), limit {LIMIT:.0e}"
    )
    if not gate["green"]:
        print("the gate failed: nothing else is reported", file=sys.stderr)
        raise SystemExit(1)
    common = ["--length", str(arguments.length), "--chunk", str(arguments.chunk), "--threads", str(arguments.threads)]
    got = in_fresh_process("benchmarks.end_to_end.long_sequence", "--measure", *common)
    above = (got["peak"] - got["before"]) / 2**30
    speed = arguments.length / got["seconds"]
    rows = [[arguments.length, arguments.chunk, got["seconds"], speed, above]]
    print_table("10 M Llama, fp32", ["tokens", "chunk", "s", "tok/s", "GiB above the weights"], rows)
    path = write_json("long-sequence", {"gate": gate, **got, "length": arguments.length, "chunk": arguments.chunk})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
