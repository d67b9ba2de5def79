"""Whether another tile changes the bits of the Triton ``linear`` on this device.

A section of ``python -m benchmarks.gpu`` (``--only tile_invariance``).

A GPU may use another matrix instruction for 16 rows than for 64 (on Hopper: mma.sync and wgmma). Where a tile for few
rows gives the bits of the one that training uses, decode may use it and still returns the training forward's
log-probabilities; ``python -m tools.tile_sweep`` writes it to ``toolkit/ops/linear/measured_tiles.json``. Every tile is
tried through the op's own launcher: heights, widths, steps, warps, stages, and rows beside other neighbours.
"""

from collections.abc import Container
from dataclasses import asdict, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import print_table, relative_error
from benchmarks.gpu.device import DEVICE, DRY, HALF, normal, replayed
from benchmarks.gpu.section import Section
from toolkit.ops.linear import tiles
from toolkit.ops.tiles import DECODE_ROWS, GemmTile
from toolkit.ops.triton_devices import architecture

HEIGHTS = (16, 32) if DRY else (16, 32, 64, 128)
ROWS = 40 if DRY else 200
FEW = (1,) if DRY else (1, 8, 64)
# K: a whole number of steps, and not; rows stay aligned in both.
DEPTHS = (64, 48) if DRY else (2560, 2576)


def candidates(base: GemmTile, itemsize: int) -> list[GemmTile]:
    """The tile, and others that might serve few rows or show what changes bits."""
    few = tiles.DECODE_CANDIDATES[architecture(torch.device(DEVICE))][itemsize]
    made = [base, *few, *(replace(base, rows=rows) for rows in HEIGHTS)]
    if not DRY:
        made += [replace(base, rows=rows, columns=64, warps=4, stages=4) for rows in (16, 64)]
        made += [replace(base, warps=12 - base.warps), replace(base, stages=2)]
        if itemsize == 2:
            made += [replace(base, rows=64, depth=32)]
    return list(dict.fromkeys(made))


def product(x: Tensor, weight: Tensor, tile: GemmTile) -> Tensor:
    """``linear`` with this tile."""
    from toolkit.ops.linear import triton

    with mock.patch.object(tiles, "find", return_value=tile):
        return triton.linear(x, weight, None)


def unrounded(x: Tensor, weight: Tensor, tile: GemmTile) -> Tensor:
    """Its float32 sums: rounding to 16 bits would hide most of what differs."""
    empty = torch.empty

    def float32_empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return empty(*shape, dtype=torch.float32, device=device)

    with mock.patch.object(torch, "empty", float32_empty):
        return product(x, weight, tile)


def differing(x: Tensor, weight: Tensor, tile: GemmTile, wanted: Tensor) -> int:
    """Elements whose bits are not ``wanted``'s, for all rows at once and for few beside other neighbours."""
    found = int((unrounded(x, weight, tile) != wanted).sum())
    for rows in (slice(0, 1), slice(3, 11), slice(x.shape[0] - 17, x.shape[0])):
        found += int((unrounded(x[rows], weight, tile) != wanted[rows]).sum())
    return found


def survey(
    result: list[dict[str, Any]], limit: int | None, base: GemmTile, dtype: torch.dtype, section: Section
) -> None:
    """Adds every candidate for one entry of the table to ``result``: bits that differ, error, seconds at few rows."""
    torch.manual_seed(3)
    outputs = (24 if DRY else 4096) if limit is not None else (40 if DRY else 9728)
    depth, uneven = DEPTHS
    longest = max(DEPTHS)
    data = normal(ROWS, longest, dtype=dtype), normal(outputs, longest, dtype=dtype)
    (x, weight), (a, b) = (tuple(t[:, :size].contiguous() for t in data) for size in (depth, uneven))
    # Weights that come from memory each time, as in a model.
    weights = [weight.clone() for _ in range(1 if DRY else max(1, (128 << 20) // weight.nbytes))]
    for tile in candidates(base, dtype.itemsize):
        entry: dict[str, Any] = {"tile": asdict(tile)}
        result.append(entry)
        if not section.allows(str(tile), 3.0):
            entry["failed"] = "no time left"
            continue
        try:
            entry["differing"] = differing(x, weight, tile, unrounded(x, weight, base))
            entry["error"] = relative_error(unrounded(x, weight, tile), x.double() @ weight.double().T)
            if tile.rows <= DECODE_ROWS and entry["differing"] == 0:
                entry["differing_uneven"] = differing(a, b, tile, unrounded(a, b, base))
            if tile == base or entry["differing"] == 0:
                entry["seconds"] = {
                    str(rows): replayed([partial(product, x[:rows], w, tile) for w in weights]) for rows in FEW
                }
        except Exception as problem:  # a tile that does not fit this device is an answer, too
            entry["failed"] = f"{type(problem).__name__}: {problem}"[:200]


def best_decode_tile(entries: list[dict[str, Any]], candidates: Container[GemmTile]) -> dict[str, Any] | None:
    """Of a survey the fastest of ``candidates`` at few rows that has the bits of the first entry, the table's own.

    None where the table's own is broken or none is bitwise identical to it. ``speedup`` is over the table's own.
    """
    base = entries[0]
    if "seconds" not in base or base["differing"]:
        return None
    fit = [
        entry
        for entry in entries[1:]
        if entry.get("differing") == entry.get("differing_uneven") == 0
        and "seconds" in entry
        and GemmTile(**entry["tile"]) in candidates
    ]
    if not fit:
        return None
    best = min(fit, key=lambda entry: sum(entry["seconds"].values()))
    speedup = sum(base["seconds"].values()) / sum(best["seconds"].values())
    return {"tile": best["tile"], "speedup": speedup, "seconds": best["seconds"], "base_seconds": base["seconds"]}


def verdict(entries: list[dict[str, Any]], candidates: Container[GemmTile]) -> str:
    """What the survey of one entry of the table says about tiles for few rows."""
    base = entries[0]
    if "seconds" not in base:
        return f"unknown: {base.get('failed')}"
    if base["differing"]:
        return "broken: the table's own tile changes a row's bits with its neighbours"
    best = best_decode_tile(entries, candidates)
    if best is None:
        return "no decode tile: every candidate changes bits"
    rows = ", ".join(map(str, FEW))
    return f"{GemmTile(**best['tile'])} is bitwise identical, {best['speedup']:.2f}x the speed at {rows} rows"


def bench_tile_invariance(section: Section) -> None:
    """The survey of every entry of this device's table, and a verdict for each."""
    arch = architecture(torch.device(DEVICE))
    for dtype in (HALF, torch.float32):
        for limit, base in tiles.TABLE.entries[arch][dtype.itemsize]:
            name = f"{str(dtype).removeprefix('torch.')}, N {'any' if limit is None else limit}"
            found: dict[str, Any] = {"itemsize": dtype.itemsize, "tiles": []}
            section.result[name] = found
            survey(found["tiles"], limit, base, dtype, section)
            found["verdict"] = verdict(found["tiles"], tiles.DECODE_CANDIDATES[arch][dtype.itemsize])


def show(result: dict[str, Any], ceilings: dict[str, float]) -> None:
    for name, found in result.items():
        rows = []
        for entry in found["tiles"]:
            tile, seconds = GemmTile(**entry["tile"]), entry.get("seconds", {})
            size = f"{tile.rows} x {tile.columns} x {tile.depth}, {tile.warps} warps, {tile.stages} stages"
            bits = entry.get("failed") or entry["differing"] + entry.get("differing_uneven", 0)
            rows.append([size, bits, entry.get("error", ""), *(seconds.get(str(n), 0.0) * 1e6 for n in FEW)])
        header = ["tile", "bits differ", "error", *(f"us at {n} rows" for n in FEW)]
        print_table(f"linear {name}: {found['verdict']}", header, rows)
