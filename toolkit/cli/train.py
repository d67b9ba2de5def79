"""``toolkit train RECIPE [key=value ...]``."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from toolkit.cli.resume import resume_command
from toolkit.errors import ToolkitError

if TYPE_CHECKING:
    from toolkit.training.signals import StopRequest


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``train`` command."""
    parser = subparsers.add_parser(
        "train",
        help="train a model as a recipe says",
        description="Train a model as a recipe says. Prints the resolved recipe, saves it with the run.",
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe such as 'pretrain'")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. train.max_steps=100 optimizer.learning_rate=3e-4"
    )
    parser.add_argument(
        "--resume", action="store_true", help="resume from the run's latest checkpoint (resume_from_checkpoint=true)"
    )
    parser.add_argument("--check", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print tokens, memory and time of a step, load nothing, and stop",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 when trained, 130, 143 or 129 when SIGINT, SIGTERM or SIGHUP stopped it.

    The caller prints ToolkitError.
    """
    from toolkit.training.signals import Interrupted, StopRequest

    def notify() -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"\nInterrupted; resume with: {resume_command(args.words, stop.started)}", flush=True)

    with StopRequest(notify) as stop:
        try:
            return _train(args, stop)
        except Interrupted as interrupted:
            stop.announce()
            if "LOCAL_RANK" in os.environ:
                # Threads of a process group that is still open abort a Python that ends.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(interrupted.status)
            return interrupted.status


def _train(args: argparse.Namespace, stop: "StopRequest") -> int:
    from toolkit.config import dump, load_recipe

    recipe = load_recipe(args.recipe, [*args.overrides, *_resume(args)])
    if args.check:
        print(dump(recipe), end="")
        return 0
    if args.plan:
        from toolkit.training.plan import describe, plan_here

        print(describe(plan_here(recipe)))
        return 0
    from toolkit.training.loop import train

    train(recipe, stop=stop)
    return 0


def _resume(args: argparse.Namespace) -> list[str]:
    """The override that ``--resume`` stands for.

    Raises:
        ToolkitError: another one contradicts it.
    """
    if not args.resume:
        return []
    for override in args.overrides:
        name, _, value = override.partition("=")
        if name == "resume_from_checkpoint" and value.lower() != "true":
            raise ToolkitError(
                f"--resume and resume_from_checkpoint={value} contradict each other; --resume is "
                "resume_from_checkpoint=true, the latest checkpoint: give one of the two."
            )
    return ["resume_from_checkpoint=true"]
