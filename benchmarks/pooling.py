"""Embeddings of texts of ragged lengths: one ragged batch against transformers' padded ones, on the CPU.

``python -m benchmarks.pooling [--models NAME ...] [--texts N] [--longest N] [--batch N] [--repeats N] [--json NAME]``:
the median seconds of process time for all texts, by models with random weights: an encoder of MiniLM-L6's shape (mean
pooling), and a 32 M Qwen3 (last token), normalised. Lengths are log-uniform from 8 to ``--longest`` tokens. The peers
are transformers with SDPA: batches in the order of the texts, and batches of texts sorted by length, as
sentence-transformers makes them. ``prefix`` is the decoder with texts that begin with the same half of ``--longest``
tokens (an instruction). All take turns, and process time is counted, so that a busy machine slows each equally. Every
embedding must be that of its text alone by transformers, within 1e-5.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import print_table, qwen3, relative_error, turns, write_json
from toolkit.engine.pooling import PoolingEngine, PoolingInput

LIMIT = 1e-5
VOCABULARY = 8192
PADDING = 0


def minilm(layers: int) -> Any:
    """An encoder of the shape of MiniLM-L6 with random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_attention_heads": 12,
        "num_hidden_layers": layers,
    }
    return BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, **sizes)).eval()


def decoder(layers: int) -> Any:
    return qwen3(num_hidden_layers=layers).model


MODELS: dict[str, tuple[Callable[[int], Any], int, str]] = {
    "encoder": (minilm, 6, "MEAN"),
    "decoder": (decoder, 8, "LAST"),
    "prefix": (decoder, 8, "LAST"),
}


def texts_of(count: int, longest: int, prefix: int) -> list[list[int]]:
    """Token ids; with ``prefix`` the first of them are the same in all texts."""
    source = torch.Generator().manual_seed(7)
    shared = torch.randint(1, VOCABULARY, (prefix,), generator=source).tolist()
    lengths = torch.empty(count).uniform_(math.log(8), math.log(longest - prefix), generator=source).exp().int()
    return [shared + torch.randint(1, VOCABULARY, (n,), generator=source).tolist() for n in lengths.tolist()]


@torch.inference_mode()
def padded(model: Any, texts: list[list[int]], kind: str, batch: int, by_length: bool) -> list[Tensor]:
    """Embeddings by transformers, in batches padded on the right."""
    order = sorted(range(len(texts)), key=lambda at: -len(texts[at])) if by_length else list(range(len(texts)))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch):
        few = order[start : start + batch]
        width = max(len(texts[at]) for at in few)
        ids = torch.tensor([texts[at] + [PADDING] * (width - len(texts[at])) for at in few])
        mask = torch.tensor([[1] * len(texts[at]) + [0] * (width - len(texts[at])) for at in few])
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        if kind == "MEAN":
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            pooled = hidden[torch.arange(len(few)), mask.sum(1) - 1]
        found |= dict(zip(few, F.normalize(pooled, dim=-1)))
    return [found[at] for at in range(len(texts))]


def measure(name: str, sizes: argparse.Namespace) -> dict[str, Any]:
    make, layers, kind = MODELS[name]
    plain = make(sizes.layers or layers)
    texts = texts_of(sizes.texts, sizes.longest, sizes.longest // 2 if name == "prefix" else 0)
    config = {"pooling_type": kind}
    engines = {
        numerics: PoolingEngine(
            copy.deepcopy(plain), pooler_config=config, numerics=numerics, max_num_batched_tokens=sizes.tokens
        )
        for numerics in ("fast", "bitwise")
    }
    inputs = [PoolingInput(ids) for ids in texts]
    calls: dict[str, Callable[[], list[Tensor]]] = {
        "padded": lambda: padded(plain, texts, kind, sizes.batch, False),
        "padded, by length": lambda: padded(plain, texts, kind, sizes.batch, True),
    }
    for numerics, engine in engines.items():
        calls[f"toolkit, {numerics}"] = lambda engine=engine: [one.data for one in engine.pool(inputs)]  # type: ignore[misc]
    alone = padded(plain, texts, kind, 1, False)
    errors = {side: max(map(relative_error, call(), alone)) for side, call in calls.items()}
    wrong = {side: error for side, error in errors.items() if not error <= LIMIT}
    if wrong:
        raise RuntimeError(f"Relative errors to texts alone must be <= {LIMIT:.0e}, got {wrong}.")
    times: dict[str, list[float]] = {side: [] for side in calls}
    for side in turns(calls, sizes.repeats):
        begun = time.process_time()
        calls[side]()
        times[side].append(time.process_time() - begun)
    seconds = {side: statistics.median(found) for side, found in times.items()}
    tokens = sum(map(len, texts))
    return {"model": name, "texts": len(texts), "tokens": tokens, "seconds": seconds, "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--longest", type=int, default=384)
    parser.add_argument("--batch", type=int, default=16, help="texts in a padded batch")
    parser.add_argument("--tokens", type=int, default=2048, help="max_num_batched_tokens")
    parser.add_argument("--layers", type=int, help="of each model (default: its own)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="name of a file in benchmarks/results")
    sizes = parser.parse_args()
    torch.set_num_threads(sizes.threads)
    found = [measure(name, sizes) for name in sizes.models]
    rows = []
    for one in found:
        seconds = one["seconds"]
        for side, own in seconds.items():
            ratios = [seconds[peer] / own for peer in ("padded", "padded, by length")]
            rows.append([one["model"], side, own, one["tokens"] / own, *ratios])
    header = ["model", "side", "seconds", "tokens/s", "x padded", "x by length"]
    print_table(f"embeddings of {sizes.texts} texts", header, rows)
    if sizes.json:
        write_json(sizes.json, {"sizes": vars(sizes), "measured": found})


if __name__ == "__main__":
    main()
