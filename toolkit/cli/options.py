"""Options that several subcommands share: where the model runs and how much the engine takes on."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

from toolkit.engine.config import AUTO, EngineConfig
from toolkit.errors import ToolkitError
from toolkit.loading import DTYPES, RUNNERS, choose_runner, find_source, load_model, sampling_defaults, with_draft_model

if TYPE_CHECKING:
    from toolkit.engine import Engine
    from toolkit.engine.pooling import PoolingEngine


def add_model_options(parser: argparse.ArgumentParser, flag: bool = False) -> None:
    """The positional ``model``, or ``--model``, with ``--dtype``, ``--device`` and ``--numerics``."""
    about = "a model's folder, a training run, a GGUF file or a repository such as org/name"
    if flag:
        parser.add_argument("--model", required=True, help=about)
    else:
        parser.add_argument("model", help=about)
    parser.add_argument("--revision", help="branch, tag or commit of a repository (default: main)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    add_quantise_option(parser)
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (default: cpu)")
    parser.add_argument("--numerics", choices=("bitwise", "fast"), help="numerics mode (default: bitwise on CPU)")


def add_quantise_option(parser: argparse.ArgumentParser) -> None:
    """``--quantise``."""
    parser.add_argument(
        "--quantise",
        metavar="FORMAT",
        help="round the weights of layers to a low-precision format, such as int8, int4, nf4 or fp8 (default: as they "
        "are)",
    )


def quantise_as_asked(args: argparse.Namespace, model: Any) -> Any:
    """The model, quantised in place where ``--quantise`` asks for it, which is printed on standard error."""
    if args.quantise is not None:
        from toolkit.quantised import quantise

        print(quantise(model, args.quantise), file=sys.stderr, flush=True)
    return model


def load(args: argparse.Namespace, runner: str = "generate") -> tuple[Any, Any]:
    """(model, tokenizer or None) that the options of ``add_model_options`` describe."""
    how = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    ranks = getattr(args, "ranks", None)
    device = args.device if ranks is None else ranks.device(args.device)
    model, tokenizer = load_model(args.model, args.dtype, device, runner=runner, **how)
    return quantise_as_asked(args, model), tokenizer


def add_runner_options(parser: argparse.ArgumentParser) -> None:
    """``--runner`` and ``--pooler-config``."""
    parser.add_argument(
        "--runner",
        choices=("auto", *RUNNERS),
        default="auto",
        help="what the model is for: pooling gives embeddings, scores and classes (default: what its files say)",
    )
    parser.add_argument(
        "--pooler-config",
        type=json.loads,
        metavar="JSON",
        help='of a pooling model, such as \'{"pooling_type": "MEAN", "normalize": true}\' (default: its files)',
    )


def runner_of(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The runner that the options ask for, and what the model's files say about pooling."""
    source = find_source(args.model, revision=args.revision, trust_remote_code=args.trust_remote_code)
    runner, settings = choose_runner(source, args.runner)
    if runner == "generate" and args.pooler_config is not None:
        raise ToolkitError("--pooler-config must be left out for a model that generates; see --runner pooling.")
    return runner, settings


def make_pooling_engine(args: argparse.Namespace, model: Any, settings: dict[str, Any]) -> "PoolingEngine":
    """The engine of a pooling model that the options describe.

    Raises:
        ToolkitError: an option that is for models that generate.
    """
    from toolkit.engine.pooling import PoolerConfig, PoolingEngine

    given = {field.name: getattr(args, field.name) for field in fields(EngineConfig) if hasattr(args, field.name)}
    taken = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "numerics")
    wrong = next((name for name in given if name not in taken), None)
    if wrong is not None:
        raise ToolkitError(f"--{wrong.replace('_', '-')} must be left out for a pooling model, got {given[wrong]!r}.")
    longest = settings.pop("max_model_len", None)
    if longest is not None:
        given.setdefault("max_model_len", longest)
    config = PoolerConfig.of(args.pooler_config, PoolerConfig(**settings))
    return PoolingEngine(model, pooler_config=config, **given)


def load_images(args: argparse.Namespace) -> Any:
    """The processor of the model's images; None where there is none, or where it does not load, which is printed."""
    from toolkit.loading.processor import load_processor

    source = find_source(args.model, revision=args.revision, trust_remote_code=args.trust_remote_code)
    try:
        return load_processor(source)
    except ToolkitError as error:
        print(f"images are not taken: {error}", file=sys.stderr, flush=True)
        return None


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """``--generation-config``."""
    parser.add_argument(
        "--generation-config",
        default="auto",
        metavar="auto|vllm|FOLDER",
        help="where sampling defaults come from: the model's generation_config.json (default: auto), nowhere (vllm), "
        "or that of another folder",
    )


def load_sampling_defaults(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What ``--generation-config`` gives requests that do not say otherwise; printed in one line on standard error."""
    from toolkit.engine import SamplingParams

    defaults = sampling_defaults(model, args.generation_config)
    folder = "the model" if args.generation_config == "auto" else f"'{args.generation_config}'"
    try:
        SamplingParams(**defaults)
    except ToolkitError as error:
        raise ToolkitError(
            f"generation_config.json of {folder} gives no usable defaults ({str(error).rstrip('.')}); mend it, or "
            "leave it out with --generation-config vllm."
        ) from None
    if defaults:
        shown = ", ".join(f"{name} {value}" for name, value in defaults.items())
        source = f"generation_config.json of {folder}"
        print(f"sampling defaults from {source}: {shown} (none with --generation-config vllm)", file=sys.stderr)
    return defaults


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """The engine's keyword arguments; what is not given keeps the engine's default. 'none' stands for None."""
    group = parser.add_argument_group("engine")
    for field in fields(EngineConfig):
        flag = "--" + field.name.replace("_", "-")
        if flag in parser._option_string_actions:  # --numerics, which every command has
            continue
        annotation, about = get_args(field.type) if get_origin(field.type) is Annotated else (field.type, "")
        kinds = [one for one in get_args(annotation) or (annotation,) if one is not type(None)]
        how: dict[str, Any] = {"help": f"{about} (default: {_default(field.default)})", "default": argparse.SUPPRESS}
        if kinds == [bool]:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **how)
            continue
        read = json.loads if get_origin(kinds[0]) is dict else _int_or_auto if kinds == [int, str] else kinds[0]
        how["metavar"] = {_int_or_auto: "N|auto", int: "N", float: "X", str: "TEXT"}.get(read, "JSON")
        group.add_argument(flag, type=read if annotation == kinds[0] else _or_none(read), **how)


def _int_or_auto(text: str) -> int | str:
    return text if text.lower() == AUTO else int(text)


_int_or_auto.__name__ = "int or 'auto'"  # argparse shows it in errors


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def value(text: str) -> Any:
        return None if text.lower() == "none" else read(text)

    value.__name__ = "JSON" if read is json.loads else read.__name__  # argparse shows it in errors
    return value


def _default(value: Any) -> Any:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else "none" if value is None else value


def make_engine(args: argparse.Namespace, model: Any, tokenizer: Any) -> "Engine":
    """The engine that the options describe."""
    from toolkit.engine import Engine

    given = {field.name: getattr(args, field.name) for field in fields(EngineConfig) if hasattr(args, field.name)}
    ranks = getattr(args, "ranks", None)
    if ranks is not None:
        engine: Engine = ranks.engine(model, tokenizer, given)
        return engine
    return Engine(model, tokenizer, **with_draft_model(given, args.dtype, args.device))
