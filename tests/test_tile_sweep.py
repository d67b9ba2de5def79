"""What a survey of tiles on a device writes, and who reads it."""

import json
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from toolkit.ops.linear import tiles
from toolkit.ops.tiles import DECODE_ROWS
from tools import tile_sweep
from tools.compile_kernels.compiler import SHARED_LIMIT

BASE = tiles.TABLE.find("sm_90", torch.bfloat16, 4096)
FAST, FASTER, SLOW = tiles.DECODE_CANDIDATES["sm_90"][2][:3]


def entry(tile, seconds, differing=0, uneven=0):
    return {"tile": asdict(tile), "differing": differing, "differing_uneven": uneven, "seconds": {"1": seconds}}


def survey(*others, of_base=0):
    return {"bfloat16, N 4096": {"itemsize": 2, "tiles": [entry(BASE, 4.0, of_base), *others]}}


def write_run(path, found, **changes):
    about = {"dry_run": False, "machine": {"gpu": "NVIDIA H200"}, "versions": {"triton": "3.6.0"}, "time": "2026-11-30"}
    path.write_text(json.dumps({**about, **changes, "sections": {"tile_invariance": {"result": found}}}))
    return ["tile_sweep", "--from", str(path)]


def test_the_fastest_tile_that_keeps_every_bit_is_written_and_serves_few_rows_there(tmp_path, monkeypatch, capsys):
    found = survey(entry(FAST, 2.0), entry(FASTER, 1.0, differing=3), entry(SLOW, 1.5, uneven=1))
    monkeypatch.setattr("sys.argv", write_run(tmp_path / "gpu.json", found))
    monkeypatch.setattr(tiles, "MEASURED", tmp_path / "measured_tiles.json")
    old = [{"device": device, "triton": "3.6.0", "of": "x", "itemsize": 2} for device in ("NVIDIA H100", "NVIDIA H200")]
    tiles.MEASURED.write_text(json.dumps(old))
    tile_sweep.main()
    assert "2.00x" in capsys.readouterr().out
    first, written = json.loads(tiles.MEASURED.read_text())
    assert first == old[0]
    assert (written["device"], written["triton"], written["time"]) == ("NVIDIA H200", "3.6.0", "2026-11-30")
    assert (written["base"], written["tile"], written["speedup"]) == (asdict(BASE), asdict(FAST), 2.0)
    assert tiles.decode_tiles([written], "NVIDIA H200", "3.6.0") == {(2, BASE): FAST}
    assert tiles.decode_tiles([written], "NVIDIA H200", "3.9.0") == {}
    assert DECODE_ROWS == 64


@pytest.mark.parametrize(
    "found",
    [
        survey(),
        survey(entry(FAST, 5.0)),
        survey(entry(FAST, 2.0), of_base=1),
        survey({"tile": asdict(FAST), "failed": "x"}),
    ],
    ids=["nothing", "slower", "broken", "failed"],
)
def test_nothing_is_written_without_a_faster_tile_of_the_same_bits(found):
    assert tile_sweep.measured_entries(found, "NVIDIA H200", "3.6.0", "2026-11-30") == []


def test_a_dry_run_measures_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", write_run(tmp_path / "gpu.json", survey(), dry_run=True))
    with pytest.raises(SystemExit):
        tile_sweep.main()
    assert "no survey of tiles on a device" in capsys.readouterr().err


def test_every_table_says_where_it_was_measured(monkeypatch, capsys):
    known = tile_sweep.tables()
    assert {"attention.FORWARD", "grouped_linear.PRODUCT", "linear.TABLE", "linear_logprob.LOGITS"} <= known.keys()
    assert all(table.measured.keys() <= table.entries.keys() - {"interpreter"} for table in known.values())
    here = "NVIDIA H200, Triton 3.6.0, 2026-11-30"
    monkeypatch.setattr(tiles, "TABLE", replace(tiles.TABLE, measured={"sm_90": here}))
    found = {(name, arch): where for name, arch, where in tile_sweep.measured_on()}
    assert found.pop(("linear.TABLE", "sm_90")) == here
    assert set(found) == {(name, arch) for name in known for arch in SHARED_LIMIT} - {("linear.TABLE", "sm_90")}
    assert set(found.values()) == {"none"}
    monkeypatch.setattr("sys.argv", ["tile_sweep", "--tables"])
    tile_sweep.main()
    assert "measured on" in capsys.readouterr().out
