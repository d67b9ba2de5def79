"""Options that several subcommands share: where the model runs and how much the engine takes on."""

import argparse
from typing import Any

from toolkit.loading import DTYPES, load_model

LIMITS = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "num_blocks")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The positional ``model`` with ``--dtype``, ``--device`` and ``--numerics``."""
    parser.add_argument("model", help="a model's folder, a training run, a GGUF file or a repository such as org/name")
    parser.add_argument("--revision", help="branch, tag or commit of a repository (default: main)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (default: cpu)")
    parser.add_argument("--numerics", choices=("bitwise", "fast"), help="tier (default: bitwise on CPU)")


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer or None) that the options of ``add_model_options`` describe."""
    return load_model(
        args.model, args.dtype, args.device, revision=args.revision, trust_remote_code=args.trust_remote_code
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """The engine's limits; what is not given keeps the engine's default."""
    parser.add_argument("--max-num-seqs", type=int, metavar="N", help="sequences in a step")
    parser.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="tokens in a step")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="tokens of prompt and completion together")
    parser.add_argument("--block-size", type=int, metavar="N", help="tokens in a page of state")
    parser.add_argument("--num-blocks", type=int, metavar="N", help="pages of state")
    parser.add_argument(
        "--no-enable-prefix-caching", action="store_true", help="do not reuse the state of common prefixes"
    )


def make_engine(args: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    """The engine that the options describe."""
    from toolkit.engine import Engine

    limits = {name: getattr(args, name) for name in LIMITS if getattr(args, name, None) is not None}
    if getattr(args, "no_enable_prefix_caching", False):
        limits["enable_prefix_caching"] = False
    return Engine(model, tokenizer, numerics=args.numerics, **limits)
