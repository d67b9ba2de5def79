"""Options that several subcommands share: where the model runs and how much the engine takes on."""

import argparse
from typing import TYPE_CHECKING, Any

from toolkit.loading import DTYPES, load_model

if TYPE_CHECKING:
    from toolkit.engine import Engine

ENGINE_OPTIONS = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "block_size",
    "num_blocks",
    "swap_space",
    "enable_prefix_caching",
)
"""Options that are keyword arguments of the engine."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The positional ``model`` with ``--dtype``, ``--device`` and ``--numerics``."""
    parser.add_argument("model", help="a model's folder, a training run, a GGUF file or a repository such as org/name")
    parser.add_argument("--revision", help="branch, tag or commit of a repository (default: main)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (default: cpu)")
    parser.add_argument("--numerics", choices=("bitwise", "fast"), help="numerics mode (default: bitwise on CPU)")


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer or None) that the options of ``add_model_options`` describe."""
    return load_model(
        args.model, args.dtype, args.device, revision=args.revision, trust_remote_code=args.trust_remote_code
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """The engine's keyword arguments; what is not given keeps the engine's default."""
    parser.add_argument("--max-num-seqs", type=int, metavar="N", help="sequences in a step")
    parser.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="tokens in a step")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="tokens of prompt and completion together")
    parser.add_argument("--block-size", type=int, metavar="N", help="tokens of state in a block")
    parser.add_argument("--num-blocks", type=int, metavar="N", help="blocks of state")
    parser.add_argument("--swap-space", type=float, metavar="GIB", help="host memory for preempted sequences")
    parser.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="reuse the state of common prefixes (default: on)",
    )


def make_engine(args: argparse.Namespace, model: Any, tokenizer: Any) -> "Engine":
    """The engine that the options describe."""
    from toolkit.engine import Engine

    given = {name: getattr(args, name) for name in ENGINE_OPTIONS if getattr(args, name, None) is not None}
    return Engine(model, tokenizer, numerics=args.numerics, **given)
