"""The page of a run: a file of steps while it grows and is cut, what the page asks for, who gets it, how it ends.
``tests/soak/test_watch_in_a_browser.py`` uses it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import httpx
import pytest

from tests.helpers.told_engine import ToldEngine, client_of
from toolkit.cli import main
from toolkit.errors import ToolkitError
from toolkit.serving.page.content import page_files
from toolkit.serving.watch.lines import StepFile
from toolkit.serving.watch.run import MOST_POINTS, WatchedRun
from toolkit.serving.watch.server import WatchServer


def write(path, steps, loss=1.0, mode="w"):
    with path.open(mode) as file:
        file.writelines(json.dumps({"step": step, "loss": loss}) + "\n" for step in steps)


def run_folder(folder, steps=3):
    """What a run of GRPO has written so far."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text("run_name: mine\nobjective: {kind: grpo}\ntrain: {max_steps: 9}\n")
    write(folder / "metrics.jsonl", range(1, steps + 1))
    details = {"step": 2, "completions": [{"prompt": "a", "completion": "é", "reward": None}]}
    (folder / "details.jsonl").write_text(json.dumps(details) + "\n")
    return folder


def test_a_file_of_steps_grows_is_cut_and_comes_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = StepFile(path)
    file.update()
    assert file.steps == []
    first = file.generation
    write(path, [1, 2])
    with path.open("a") as half:
        half.write('{"step": 3, "lo')
    file.update()
    assert [one.step for one in file.steps] == [1, 2]
    with path.open("a") as half:
        half.write('ss": 1.0}\n')
    file.update()
    assert [json.loads(line)["step"] for line in file.read(file.steps)] == [1, 2, 3]
    assert file.generation == first
    write(path, [1, 2, 3], loss=2.0)  # as long as before, another run
    file.update()
    assert file.generation == first + 1
    assert [json.loads(line)["loss"] for line in file.read(file.steps)] == [2.0] * 3
    old = list(file.steps)
    write(path, [1], loss=2.0)  # resumed after its first step
    assert file.read(old) == []
    file.update()
    assert ([one.step for one in file.steps], file.generation) == ([1], first + 2)
    path.unlink()
    file.update()
    assert (file.steps, file.generation) == ([], first + 3)


def test_what_the_page_asks_for(tmp_path):
    run = WatchedRun(run_folder(tmp_path / "run"))
    all_of_it = json.loads(run.respond("steps", {}))
    about = {"name": "mine", "objective": "grpo", "max_steps": 9, "finished": False, "nested": []}
    assert all_of_it["run"] == about
    assert (all_of_it["fresh"], all_of_it["count"], all_of_it["stride"], all_of_it["detailed_steps"]) == (
        True,
        3,
        1,
        [2],
    )
    assert [line["step"] for line in all_of_it["lines"]] == [1, 2, 3]
    write(run.folder / "metrics.jsonl", [4], mode="a")
    (run.folder / "result.json").write_text("{}")
    seen = {"generation": str(all_of_it["generation"]), "after": "3"}
    new = json.loads(run.respond("steps", seen))
    assert ([line["step"] for line in new["lines"]], new["fresh"], new["run"]["finished"]) == ([4], False, True)
    assert json.loads(run.respond("details", {"step": "2"}))["completions"][0]["completion"] == "é"
    assert [run.respond("details", {"step": step}) for step in ("3", "-1", "x", "")] == [None] * 4
    assert run.respond("recipe.yaml", {}) is None
    write(run.folder / "metrics.jsonl", range(1, MOST_POINTS + 4), loss=2.0)
    thinned = json.loads(run.respond("steps", seen))
    assert (thinned["stride"], thinned["count"], thinned["lines"][-1]["step"]) == (2, MOST_POINTS + 3, MOST_POINTS + 3)
    assert len(thinned["lines"]) == MOST_POINTS // 2 + 2


def test_the_server_responds_to_this_machine_alone(tmp_path):
    with WatchServer(WatchedRun(run_folder(tmp_path / "run")), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with httpx.Client(base_url=server.url) as client:
                page = client.get("/")
                assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
                assert "default-src 'self'" in page.headers["content-security-policy"]
                named = re.findall(r'(?:href|src)="([^"]+)"', page.text)
                assert "page/watch.js" in named
                for path in (*named, *(f"page/{name}" for name in page_files())):
                    assert client.get(f"/{path}").status_code == 200, path
                assert client.head("/").text == ""
                assert len(client.get("/watch/steps", params={"after": "0"}).json()["lines"]) == 3
                for path in (
                    "/watch/metrics.jsonl",
                    "/page/../recipe.yaml",
                    "/page/content.py",
                    "/watch/details?step=7",
                ):
                    assert client.get(path).status_code == 404, path
                assert client.get("/watch/steps", headers={"host": "example.org"}).status_code == 421
                assert client.get("/watch/steps", headers={"host": "localhost:1"}).status_code == 200
        finally:
            server.shutdown()
            thread.join()


def test_it_ends_with_a_signal_and_loads_no_torch(tmp_path):
    folder = run_folder(tmp_path / "run")
    code = "import sys, toolkit.cli as cli; cli.main(sys.argv[1:]); print({'torch', 'fastapi'} & set(sys.modules))"
    command = [sys.executable, "-c", code, "watch", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith(f"watching {folder} on http://127.0.0.1:"), process.stderr.read()
        assert httpx.get(f"{line.split()[-1]}/watch/steps").status_code == 200
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, errors) == (0, "set()\n", "")


def test_a_served_model_shows_a_run_beside_its_page(tmp_path):
    client, _ = client_of(ToldEngine(), api_key="secret", watch=WatchedRun(run_folder(tmp_path / "run")))
    with client:
        accept = {"accept": "text/html"}
        assert '<a href="watch">Training</a>' in client.get("/", headers=accept).text
        assert '<a href="./">Chat</a>' in client.get("/watch").text
        assert client.get("/watch/steps").status_code == 401
        client.headers["authorization"] = "Bearer secret"
        assert len(client.get("/watch/steps").json()["lines"]) == 3
        assert client.get("/watch/details?step=2").json()["step"] == 2
        assert client.get("/watch/details?step=3").status_code == 404
    client, _ = client_of(ToldEngine())
    with client:
        assert client.get("/watch").status_code == 404
        assert 'href="watch"' not in client.get("/", headers=accept).text


def test_a_folder_that_no_run_has_written(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("")
    assert main(["watch", str(tmp_path), "--port", "0"]) == 2
    assert "RUN must be the folder of a training run" in capsys.readouterr().err
    with pytest.raises(ToolkitError, match="no folder"):
        WatchedRun(tmp_path / "nowhere")
    with pytest.raises(ToolkitError, match=r"Cannot listen on host '127\.0\.0\.1', port 99999"):
        WatchServer(WatchedRun(run_folder(tmp_path / "run")), "127.0.0.1", 99999)
    os.mkdir(tmp_path / "empty")
    assert json.loads(WatchedRun(tmp_path / "empty").respond("steps", {}))["lines"] == []  # a run may begin later
