"""``toolkit generate``: continues prompts through the engine, all in one batch, streamed to the terminal."""

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from toolkit.cli.options import add_model_options, load, make_engine
from toolkit.errors import ToolkitError

if TYPE_CHECKING:
    from rich.console import Console

    from toolkit.engine import Completion, Engine, SamplingParams

VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Control characters as text: what a model writes must not steer the terminal."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("generate", help="continue prompts with a model")
    add_model_options(parser)
    parser.add_argument("prompts", nargs="*", help="texts to continue (default: one, from standard input)")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="per prompt (default: 128)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable token (default: 1)")
    parser.add_argument("--top-p", type=float, default=1.0, help="probability mass to sample from (default: 1, off)")
    parser.add_argument("--top-k", type=int, default=0, help="most probable tokens to sample from (default: 0, off)")
    parser.add_argument("--seed", type=int, help="of every prompt's samples (default: a fresh one)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0, or 1 when a prompt's generation failed."""
    prompts = [_argument_text(prompt, at) for at, prompt in enumerate(args.prompts, 1)]
    if not prompts and not sys.stdin.isatty():
        prompts = [_standard_input()]
    if not any(prompts):
        raise ToolkitError("There is nothing to continue; give one or more prompts, or a text on standard input.")

    from toolkit.engine import SamplingParams

    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
    )

    model, tokenizer = load(args)
    if tokenizer is None:
        raise ToolkitError(
            f"The model '{args.model}' has no tokenizer, and so cannot continue text; serve it, and send token ids."
        )
    with make_engine(args, model, tokenizer) as engine:
        return _show(engine, prompts, params)


def _argument_text(argument: str, number: int) -> str:
    """An argument as UTF-8 text; in a locale with another encoding Python has kept its bytes as lone surrogates."""
    try:
        argument.encode()
        return argument
    except UnicodeEncodeError:
        return _utf8(os.fsencode(argument), f"prompt {number}")


def _standard_input() -> str:
    buffer = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if buffer is None else _utf8(buffer.read(), "standard input")


def _utf8(text: bytes, name: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ToolkitError(
            f"{name} must be UTF-8 text, got the byte 0x{text[error.start]:02x} at byte {error.start}; convert it "
            "first, such as with iconv."
        ) from None


def _show(engine: "Engine", prompts: list[str], params: "SamplingParams") -> int:
    """Stream the first prompt's text as it comes; the others, computed in the same batch, follow in order."""
    from rich.console import Console

    console = Console(highlight=False)
    started = time.perf_counter()
    order = [engine.submit(prompt, params) for prompt in prompts]
    unread = dict.fromkeys(order, "")
    done: dict[int, Completion] = {}
    shown = 0
    _head(console, prompts, 0)
    while len(done) < len(order):
        for delta in engine.step():
            if delta.request_id == order[min(shown, len(order) - 1)]:
                _write(console, delta.text)
            else:
                unread[delta.request_id] += delta.text
            if delta.finished is not None:
                done[delta.request_id] = delta.finished
        while shown < len(order) and order[shown] in done:
            _tail(console, done[order[shown]])
            shown += 1
            if shown < len(order):
                _head(console, prompts, shown)
                _write(console, unread.pop(order[shown]))
    seconds = time.perf_counter() - started
    tokens = sum(len(completion.token_ids) for completion in done.values())
    many = f"{len(prompts)} prompts" if len(prompts) > 1 else "1 prompt"
    console.print(f"[dim]{tokens} tokens for {many} in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s[/dim]")
    return int(any(completion.finish_reason == "error" for completion in done.values()))


def _write(console: "Console", text: str) -> None:
    """The model's text as it is: rich would expand tabs, by the offset in a chunk instead of the line."""
    console.file.write(text.translate(VISIBLE))
    console.file.flush()


def _head(console: "Console", prompts: list[str], index: int) -> None:
    if len(prompts) > 1:
        console.rule(f"prompt {index + 1} of {len(prompts)}", align="left", style="dim")
    console.out(prompts[index].translate(VISIBLE), end="", style="bold cyan")


def _tail(console: "Console", completion: "Completion") -> None:
    reason = completion.finish_reason
    console.out("")
    if reason == "error":
        console.out(f"(failed: {completion.error})", style="red")
    else:
        console.out(f"({len(completion.token_ids)} tokens, ended by {reason})\n", style="dim")
