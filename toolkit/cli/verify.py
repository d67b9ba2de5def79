"""``toolkit verify``: returned log-probabilities against the training forward's, under random schedules."""

import argparse
from typing import Any

from toolkit.cli.options import add_quantise_option, quantise_as_asked
from toolkit.loading import DTYPES


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("verify", help="compare rollout and training log-probabilities bit for bit")
    parser.add_argument("model", nargs="?", help="checkpoint folder or training run")
    parser.add_argument("--random", metavar="FAMILY", action="append", help="a small random model instead (repeatable)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default float32)")
    add_quantise_option(parser)
    parser.add_argument("--tokens", type=int, default=2000, help="sampled tokens to compare at least (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the schedules (default 0)")
    parser.add_argument("--numerics", choices=["bitwise", "fast"], default=None, help="numerics mode to verify")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "int8"], default="auto", help="of keys and values")
    parser.add_argument(
        "--no-writes", action="store_true", help="do not verify copies of the model whose weights are written meanwhile"
    )
    parser.add_argument(
        "--no-overhead", action="store_true", help="do not measure the overhead of bitwise mode over fast mode"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 1 if a token differs in bitwise mode, else 0."""
    from toolkit.errors import ToolkitError
    from toolkit.patching.apply import patch
    from toolkit.testing.parity import bitwise_overhead, check_parity

    if (args.model is None) == (not args.random):
        raise ToolkitError("verify needs either a model folder or --random FAMILY.")
    if args.tokens < 1:
        raise ToolkitError(f"--tokens must be >= 1, got {args.tokens}.")
    broken = False
    for name, model, prompts in _subjects(args):
        if args.kv_cache_dtype != "auto":
            patch(model, numerics=args.numerics, kv_cache_dtype=args.kv_cache_dtype)
        parity = check_parity(model, prompts, min_tokens=args.tokens, seed=args.seed, numerics=args.numerics)
        broken |= parity.numerics == "bitwise" and parity.differing + parity.replayed_differing > 0
        print(
            f"{name}, {parity.numerics} mode: {parity.tokens} sampled tokens, {parity.differing} whose log-probability "
            f"is not bitwise identical to the training forward's, largest difference {parity.largest:.1e}"
        )
        print(
            f"  {parity.schedules} random schedules: {parity.chunked_prompts} prompts prefilled in chunks, "
            f"{parity.prefix_cache_hits} tokens from the prefix cache, {parity.num_preemptions} preemptions "
            f"({parity.num_swaps} swapped out), {parity.forked} forks",
            flush=True,
        )
        if parity.rotary_crossings:
            print(
                f"  {parity.rotary_crossings} completions grew past a length after which the rotary tables are others",
                flush=True,
            )
        if parity.replayed:
            print(
                f"  {parity.replayed} tokens computed again with the engine's routing and selected keys replayed, "
                f"{parity.replayed_differing} not bitwise identical",
                flush=True,
            )
        for what, copied in () if args.no_writes else _copies(model):
            written = check_parity(
                copied, prompts, min_tokens=-(-args.tokens // 4), seed=args.seed, numerics=args.numerics, writes=True
            )
            broken |= written.numerics == "bitwise" and written.differing + written.replayed_differing > 0
            print(
                f"  {what}: {written.writes.total()} writes of {len(written.writes)} kinds between and during "
                f"generations, {written.tokens} tokens, {written.differing} not bitwise identical",
                flush=True,
            )
        if not args.no_overhead:
            overhead = bitwise_overhead(model, prompts[:8])
            print(
                f"  time of bitwise mode relative to fast mode: {overhead.generate_ratio:.2f}x to generate, "
                f"{overhead.train_ratio:.2f}x for a training forward and backward",
                flush=True,
            )
    return 1 if broken else 0


def _copies(model: Any) -> Any:
    """Copies of the model for writes to their weights: as it is, and with adapters on its embedding."""
    import copy

    from toolkit.testing.weight_writes import with_embedding_adapters

    yield "weights written", copy.deepcopy(model)
    if hasattr(model, "peft_config"):
        return
    try:
        yield "weights written, LoRA on the embedding", with_embedding_adapters(copy.deepcopy(model)).get_base_model()
    except ImportError:
        print("  adapters on the embedding: not verified, as peft is not installed", flush=True)


def _subjects(args: argparse.Namespace) -> Any:
    """Name, model and prompts (token ids) of everything to verify."""
    import random

    import torch

    source = random.Random(args.seed)
    if args.random:
        from toolkit.testing.models import random_model

        for family in args.random:
            model = quantise_as_asked(args, random_model(family, seed=args.seed).to(getattr(torch, args.dtype)))
            vocabulary = model.config.vocab_size
            prompts = [[source.randrange(3, vocabulary) for _ in range(source.randint(2, 90))] for _ in range(32)]
            yield f"random {family}", model, prompts
        return
    from toolkit.exporting.compared import text_prompts
    from toolkit.loading import load_model
    from toolkit.patching.adapters import vocabulary_size

    model, tokenizer = load_model(args.model, args.dtype)
    model = quantise_as_asked(args, model)
    yield args.model, model, text_prompts(tokenizer, vocabulary_size(model), source)
