"""A reward function that runs the code of completions: ``reward_funcs: ["toolkit.training.sandbox:code"]``."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.training.sandbox.running import Limits, run_many

_BLOCK = re.compile(r"^[ \t]*```(?:python|py)?[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


def code_block(text: str) -> str | None:
    """The last block of Python between fences of three backticks; None where there is none."""
    found = _BLOCK.findall(text)
    return found[-1] if found else None


def code(
    completions: Sequence[Any],
    tests: Sequence[Any],
    cpu_seconds: Sequence[int | None] | None = None,
    memory_mb: Sequence[int | None] | None = None,
    states: Sequence[Mapping[str, Any]] | None = None,
    **_: Any,
) -> list[float | None]:
    """The share of tests that the code of each completion passes; 0 without a block of code.

    Of a conversation it is the code of the model's last turn: what an environment says is not run.

    Args:
        completions: texts or messages.
        tests: of each line: Python that raises where it fails, or a list of such texts; None does not apply.
        cpu_seconds: of each line; None for the default limit.
        memory_mb: likewise.
        states: of conversations with an environment, whose ``responses`` are the model's turns.
    """
    found: list[float | None] = [None] * len(completions)
    groups: dict[Limits, list[int]] = {}
    said = [_text(one) for one in completions]
    for at, state in enumerate(states or ()):
        if isinstance(completions[at], str):
            said[at] = "".join(state["responses"][-1:])
    blocks = [code_block(one) for one in said]
    for at, (block, own) in enumerate(zip(blocks, tests, strict=True)):
        if own is not None:
            found[at] = 0.0
            if block is not None:
                groups.setdefault(_limits(at, cpu_seconds, memory_mb), []).append(at)
    for limits, indices in groups.items():
        jobs = [(blocks[at] or "", [tests[at]] if isinstance(tests[at], str) else list(tests[at])) for at in indices]
        for at, outcome in zip(indices, run_many(jobs, limits)):
            found[at] = outcome.share
    return found


def _text(completion: Any) -> str:
    """A completion's text: of messages that of the model's last one."""
    if isinstance(completion, str):
        return completion
    said = [one for one in completion if one.get("role") == "assistant"]
    return str(said[-1]["content"]) if said else ""


def _limits(at: int, cpu_seconds: Sequence[int | None] | None, memory_mb: Sequence[int | None] | None) -> Limits:
    cpu = (cpu_seconds[at] if cpu_seconds is not None else None) or Limits.cpu_seconds
    memory = (memory_mb[at] if memory_mb is not None else None) or (Limits.memory_bytes >> 20)
    return Limits(cpu_seconds=cpu, wall_seconds=2.0 * cpu, memory_bytes=memory << 20)
