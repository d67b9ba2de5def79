"""``toolkit train RECIPE [key=value ...]``."""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from toolkit.cli.launch import (
    BEREFT,
    LAUNCHED,
    check_launched,
    end_process_group,
    end_with_launcher,
    launch,
    launched,
    lost_process,
)
from toolkit.cli.resume import resume_command
from toolkit.errors import ToolkitError, first_line

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
    parser.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="train in N processes of this machine, which share the model as train.distributed says",
    )
    parser.set_defaults(run=run)
    parse = parser.parse_known_args

    def parse_overrides(args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Overrides behind options too, where argparse does not look for them."""
        found, rest = parse(args, namespace)
        found.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
        return found, [word for word in rest if word not in found.overrides]

    parser.parse_known_args = parse_overrides  # type: ignore[method-assign]


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 when trained, 130, 143 or 129 when SIGINT, SIGTERM or SIGHUP stopped it.

    The caller prints ToolkitError.
    """
    if args.num_processes is not None:
        if launched():
            check_launched(args.num_processes)
        elif args.num_processes < 1:
            raise ToolkitError(f"--num-processes must be >= 1, got {args.num_processes}.")
        elif args.num_processes > 1 and not args.check and not args.plan:
            return launch(args.words, args.num_processes)
    end_with_launcher()
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    """In this process."""
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
        except RuntimeError as error:
            if not (launched() and lost_process(error)):
                raise
            # What the first process of ``launch`` says is shown at once, beside the sentence of the one that is gone.
            if LAUNCHED not in os.environ or os.environ.get("RANK") != "0":
                print(f"toolkit: another process of the run is gone: {first_line(error)}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(BEREFT)


def _train(args: argparse.Namespace, stop: "StopRequest") -> int:
    from toolkit.config import dump, load_recipe

    recipe = load_recipe(args.recipe, [*args.overrides, *_resume(args)])
    if args.check:
        print(dump(recipe), end="")
        return 0
    if args.plan:
        from toolkit.training.plan import describe, plan_here

        print(describe(plan_here(recipe, args.num_processes)))
        return 0
    from toolkit.training.loop import train

    train(recipe, stop=stop)
    if launched():
        end_process_group()
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
