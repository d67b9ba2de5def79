"""The table of what every kernel compiles to: its cases, and its file with digests of what each case was made from."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, describe, write_aside
from tools.compile_kernels import (
    fingerprints,
    kernel_cases_attention,
    kernel_cases_matrix,
    kernel_cases_moe,
    kernel_cases_recurrence,
    kernel_cases_rowwise,
    kernel_cases_sample,
)
from tools.compile_kernels.compiler import SHARED_LIMIT, Compiled

TABLE = ROOT / "benchmarks" / "results" / "kernels.json"


def cases() -> dict[str, Callable[[], Any]]:
    """Every kernel with every shipped tile: name -> the call that launches it."""
    modules = (
        kernel_cases_attention,
        kernel_cases_rowwise,
        kernel_cases_matrix,
        kernel_cases_moe,
        kernel_cases_sample,
        kernel_cases_recurrence,
    )
    return {name: call for module in modules for name, call in module.cases().items()}


def made_from(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """For each (case, architecture) the digest of what it is made from in this tree."""
    calls = cases()
    return {(name, arch): fingerprints.of_case(calls[name], arch) for name, arch in pairs}


def stale() -> list[tuple[str, str]]:
    """The (case, architecture) pairs whose rows in the committed table are missing, or of other sources."""
    pairs = [(name, arch) for name in cases() for arch in SHARED_LIMIT]
    now, committed = made_from(pairs), read()[0]
    return [pair for pair in pairs if now[pair] != committed.get(pair)]


def write(results: Mapping[tuple[str, str], Sequence[Compiled]], digests: Mapping[tuple[str, str], str]) -> Path:
    """Write the table, a line for each case: target -> the kernels that it launches, and what they were made from."""
    lines = []
    for case in cases():
        line: dict[str, Any] = {"case": case, "made_from": {arch: digests[case, arch] for arch in SHARED_LIMIT}}
        for arch in SHARED_LIMIT:
            line[arch] = [{k: v for k, v in asdict(made).items() if k != "arch"} for made in results[case, arch]]
        lines.append(f"    {json.dumps(line)}")
    head = json.dumps(describe(), indent=2).removesuffix("\n}")
    body = ",\n".join(lines)
    return write_aside(TABLE, f'{head},\n  "kernels": [\n{body}\n  ]\n}}\n')


def read() -> tuple[dict[tuple[str, str], str], list[tuple[str, Compiled]]]:
    """(digests, rows) of the committed table: what each (case, architecture) was made from, (case, compiled kernel)."""
    table = json.loads(TABLE.read_text())
    digests, rows = {}, []
    for line in table["kernels"]:
        for arch, digest in line["made_from"].items():
            digests[line["case"], arch] = digest
            rows += [(line["case"], Compiled(arch=arch, **entry)) for entry in line[arch]]
    return digests, rows


def compiler_of_table() -> str:
    """The version of Triton that the committed table was made with."""
    version: str = json.loads(TABLE.read_text())["versions"]["triton"]
    return version
