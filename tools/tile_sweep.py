"""Writes the tiles for few rows that a device was measured to allow: ``python -m tools.tile_sweep``.

Every candidate is tried on this machine's device against the tile that it may stand for: the bits of every row, with a
whole and an uneven number of steps and beside other rows, then the time at few rows. The fastest that keeps every bit
goes to ``toolkit/ops/linear/measured_tiles.json`` with the device, the version of Triton, the time and the speedup;
entries of other devices and versions stay. ``--from gpu.json`` takes the survey from a run of ``python -m
benchmarks.gpu`` instead, which may have been on another machine. ``--tables`` measures nothing: it prints for every
table of tiles and architecture where its tiles were measured.
"""

import argparse
import json
import pkgutil
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import describe, print_table, write_aside
from benchmarks.gpu import tile_invariance
from benchmarks.gpu.section import Section
from toolkit import ops
from toolkit.ops.linear import tiles
from toolkit.ops.tiles import GemmTile, TileTable
from toolkit.ops.triton_devices import device_name

SECONDS = 300.0


def measured_entries(survey: dict[str, Any], device: str, triton: str, time: str) -> list[dict[str, Any]]:
    """The entries that a survey of all tiles of a device gives: at most one for each tile of the table."""
    found = []
    for name, entry in survey.items():
        candidates = {tile for row in tiles.DECODE_CANDIDATES.values() for tile in row[entry["itemsize"]]}
        best = tile_invariance.best_decode_tile(entry["tiles"], candidates)
        if best is not None and best["speedup"] > 1.0:
            base = entry["tiles"][0]["tile"]
            about = {"device": device, "triton": triton, "time": time, "of": name, "itemsize": entry["itemsize"]}
            found.append({**about, "base": base, **best})
    return found


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]], device: str, triton: str) -> list[dict[str, Any]]:
    """``new`` in the place of what ``old`` has of the same device and Triton."""
    kept = [entry for entry in old if (entry["device"], entry["triton"]) != (device, triton)]
    return sorted([*kept, *new], key=lambda entry: (entry["device"], entry["triton"], entry["of"]))


def lines(entries: list[dict[str, Any]]) -> str:
    """An entry a line."""
    body = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    return f"[\n{body}\n]\n" if entries else "[]\n"


def survey_of_this_device() -> tuple[dict[str, Any], str, str, str]:
    """(survey, device, Triton, time), measured now."""
    if not torch.cuda.is_available():
        print("No CUDA device here: what a tile does to bits is a property of one.", file=sys.stderr)
        raise SystemExit(2)
    section = Section(SECONDS)
    tile_invariance.bench_tile_invariance(section)
    return section.result, device_name(torch.device("cuda", 0)), version("triton"), describe()["time"]


def survey_of_run(path: Path) -> tuple[dict[str, Any], str, str, str]:
    """(survey, device, Triton, time) of a ``gpu.json``."""
    found = json.loads(path.read_text())
    if found["dry_run"] or "tile_invariance" not in found["sections"]:
        print(f"{path} has no survey of tiles on a device.", file=sys.stderr)
        raise SystemExit(2)
    survey = found["sections"]["tile_invariance"]["result"]
    return survey, found["machine"]["gpu"], found["versions"]["triton"], found["time"]


def tables() -> dict[str, TileTable[Any]]:
    """Every table of tiles: ``op.NAME`` -> the table."""
    found: dict[str, TileTable[Any]] = {}
    for entry in pkgutil.iter_modules(ops.__path__):
        if (Path(ops.__path__[0]) / entry.name / "tiles.py").exists():
            module = vars(import_module(f"toolkit.ops.{entry.name}.tiles"))
            found |= {f"{entry.name}.{name}": value for name, value in module.items() if isinstance(value, TileTable)}
    return found


def measured_on() -> list[tuple[str, str, str]]:
    """(table, architecture, where its tiles were measured, or none) of all that a device may take."""
    return [
        (name, arch, table.measured.get(arch, "none"))
        for name, table in tables().items()
        for arch in table.entries
        if arch != "interpreter"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", type=Path, dest="run", help="gpu.json of a run of benchmarks.gpu")
    parser.add_argument("--tables", action="store_true", help="print where the tiles of every table were measured")
    arguments = parser.parse_args()
    if arguments.tables:
        print_table("Tiles of the Triton kernels", ["table", "architecture", "measured on"], measured_on())
        return
    survey, device, triton, time = survey_of_run(arguments.run) if arguments.run else survey_of_this_device()
    new = measured_entries(survey, device, triton, time)
    for entry in new:
        print(f"{device}, {entry['of']}: {GemmTile(**entry['tile'])}, {entry['speedup']:.2f}x")
    if not new:
        print(f"{device}: no tile for few rows is bitwise identical and faster")
    entries = merged(json.loads(tiles.MEASURED.read_text()), new, device, triton)
    print(f"written to {write_aside(tiles.MEASURED, lines(entries))}")


if __name__ == "__main__":
    main()
