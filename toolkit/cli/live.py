"""Options of ``toolkit serve`` for training on the weights that it serves."""

import argparse
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import ToolkitError

if TYPE_CHECKING:
    from toolkit.engine import AsyncEngine
    from toolkit.live import LiveTraining


def add_live_options(group: Any) -> None:
    """Options of the group "training"."""
    group.add_argument("--train", action="store_true", help="train LoRA adapters by Tinker's API while serving")
    group.add_argument(
        "--train-folder", metavar="FOLDER", help="where checkpoints are kept (default: a temporary folder)"
    )
    group.add_argument(
        "--train-micro-batch-tokens",
        type=int,
        metavar="N",
        help="most tokens of one forward and backward (default: 256 on a CPU, 1024 elsewhere)",
    )
    group.add_argument(
        "--train-max-wait-ms",
        type=float,
        default=50.0,
        metavar="MS",
        help="milliseconds between the tokens of a stream within which training lets decode steps run (default: 50)",
    )


def check_live_options(args: argparse.Namespace, runner: str) -> None:
    """Raise ToolkitError for training options that do not fit, or packages that are not there."""
    if not args.train:
        if args.train_folder is not None:
            raise ToolkitError("--train must be given with --train-folder.")
        return
    if runner == "pooling":
        raise ToolkitError("--train must be left out for a pooling model.")
    if args.train_micro_batch_tokens is not None and args.train_micro_batch_tokens < 1:
        raise ToolkitError(f"--train-micro-batch-tokens must be >= 1, got {args.train_micro_batch_tokens}.")
    if not (math.isfinite(args.train_max_wait_ms) and args.train_max_wait_ms >= 0):
        raise ToolkitError(f"--train-max-wait-ms must be a finite number >= 0, got {args.train_max_wait_ms}.")
    from toolkit.serving.tinker.messages import messages

    messages()
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ToolkitError("--train needs the package 'peft'; install train-infer-toolkit[live].") from None


@contextmanager
def live_training(args: argparse.Namespace, engine: "AsyncEngine", names: list[str]) -> Iterator["LiveTraining | None"]:
    """Training on ``engine`` where the options ask for it, until the end of the block.

    Args:
        names: public names of the model.
    """
    if not args.train:
        yield None
        return
    from toolkit.live import LiveConfig, LiveTraining

    folder = Path(args.model)
    tokenizer = str(folder.resolve()) if folder.is_dir() else args.model
    with tempfile.TemporaryDirectory(prefix="toolkit-train-") as temporary:
        root = Path(args.train_folder or temporary)
        durable = args.train_folder is not None
        config = LiveConfig(
            (*names, args.model),
            root,
            tokenizer,
            durable,
            micro_batch_tokens=args.train_micro_batch_tokens,
            max_wait=args.train_max_wait_ms / 1000,
        )
        yield LiveTraining(engine, config)
