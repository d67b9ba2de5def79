"""``toolkit init``: a recipe from three questions, or from a YAML of TRL or Axolotl."""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.files import write_atomic
from toolkit.sentences import shown

KINDS = {
    "sft": "supervised fine-tuning on chats or completions",
    "dpo": "preferences: chosen over rejected completions",
    "kto": "completions that are desirable or not",
    "grpo": "reinforcement learning on a task with a reward",
    "pretrain": "pretraining on a folder of text",
}
QUESTIONS = {
    "objective": "What is it for? " + "; ".join(f"{name}: {about}" for name, about in KINDS.items()),
    "model": "Which model? A folder, or a repository of the Hub such as org/name",
    "data": "Which data? A file (.jsonl .parquet .csv), a folder, a repository of the Hub; of grpo a task, such as "
    "countdown or package.module:Class",
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``init`` command."""
    parser = subparsers.add_parser(
        "init",
        help="write a recipe, from three questions or from a YAML of TRL or Axolotl",
        description="Write a recipe and its JSON schema for editors. Replies may be given as options.",
    )
    parser.add_argument("recipe", nargs="?", default="recipe.yaml", help="file to write (default: recipe.yaml)")
    parser.add_argument("--from", dest="source", metavar="FILE", help="a YAML of TRL or Axolotl to translate")
    parser.add_argument(
        "--objective", help="sft, dpo, kto, grpo or pretrain; with --from where the file leaves it open"
    )
    parser.add_argument("--model", help="a folder, or a repository such as org/name")
    parser.add_argument("--data", help="a file, a folder or a repository; of grpo a task")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the recipe; 0."""
    from toolkit.config.json_schema import FILE_NAME

    target = Path(args.recipe)
    for path in (target, target.with_name(FILE_NAME)):
        if path == target and path.exists():
            raise ToolkitError(f"{path} is there already; remove it, or name another file.")
        if not path.parent.is_dir():
            raise ToolkitError(f"{path.parent} must be a folder, got none.")
    values, comments = _translated(args) if args.source is not None else (_asked(args), [])
    _write(target, values, comments)
    print(
        f"wrote {target} and {target.with_name(FILE_NAME)}; see what it will take with: toolkit train --plan {target}"
    )
    return 0


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe of three replies."""
    from toolkit.config import validate

    kind = _reply(args.objective, "objective")
    if kind not in KINDS:
        raise ToolkitError(must_be_one_of("objective", kind, list(KINDS)))
    model, data = _reply(args.model, "model"), _reply(args.data, "data")
    objective: dict[str, Any] = {"kind": kind}
    train: dict[str, Any] = {"max_length": 1024, "batch_tokens": 4096}
    rate = {"sft": 2e-5, "pretrain": 1e-4}.get(kind, 1e-6)
    values: dict[str, Any] = {
        "run_name": f"{Path(model).name}-{kind}".lower(),
        "objective": objective,
        "model": {"name_or_path": model},
        "optimizer": {"learning_rate": rate, "weight_decay": 0.0, "adam_beta2": 0.999},
        "schedule": {"lr_scheduler_type": "cosine", "warmup_ratio": 0.03},
        "train": train,
    }
    if kind == "pretrain":
        values["data"] = {"data_dir": data, "include": ["*"]}
        train["max_steps"] = 1000
    elif kind == "grpo":
        objective |= {"task": {"name": data}, "prompts": 16, "num_generations": 8}
        objective["rollout"] = {"max_completion_length": 512, "max_num_seqs": 128}
        train["max_steps"] = 200
    else:
        objective["datasets"] = [{"path": data}]
        objective |= {"sft": {}, "dpo": {"pairs": 16}, "kto": {"lines": 16}}[kind]
        train["num_train_epochs"] = 1.0
    validate(values)
    return values


def _reply(given: str | None, question: str) -> str:
    """An option's value, or what is typed."""
    if given is None:
        if not sys.stdin.isatty():
            raise ToolkitError(f"--{question} must be given where nobody can be asked.")
        print(QUESTIONS[question])
        given = input(f"{question}: ").strip()
    if not given:
        raise ToolkitError(f"{question} must be given, got nothing.")
    return given


def _translated(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The recipe of another program's settings, and a comment on each key that it does not have."""
    from toolkit.config import read_yaml
    from toolkit.config.translation import translate

    try:
        text = Path(args.source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ToolkitError(
            f"--from must be a YAML file that can be read, got {shown(args.source)} ({error})."
        ) from None
    settings = read_yaml(text, f"'{args.source}'")
    if not isinstance(settings, dict):
        raise ToolkitError(f"--from must be a YAML file of settings, got {shown(args.source)}, which holds none.")
    for option in ("model", "data"):
        if getattr(args, option) is not None:
            raise ToolkitError(f"--{option} must be left out with --from, got {shown(getattr(args, option))}.")
    made = translate(settings, args.objective)
    comments: list[str] = []
    for title, lost in (("Without a counterpart", True), ("Not needed", False)):
        notes = [note for note in made.notes if note.lost is lost]
        if notes:
            comments.append(f"{title}:")
            comments += [f"  {note.key}: {_short(note.value)} - {note.text}" for note in notes]
            for line in comments[-len(notes) - 1 :]:
                print(line)
    return made.values, [f"From {Path(args.source).name}.", *comments]


def _short(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()[:80]


def _write(target: Path, values: dict[str, Any], comments: list[str]) -> None:
    from toolkit.config.json_schema import FILE_NAME, schema_text

    head = [f"yaml-language-server: $schema={FILE_NAME}", *comments]
    body = yaml.safe_dump(values, sort_keys=False, width=100)
    write_atomic(target.with_name(FILE_NAME), schema_text())
    write_atomic(target, "".join(f"# {line}\n" for line in head) + body)
