"""The page at ``/``: who gets it, and that nothing of it comes from elsewhere. ``tests/soak/test_page_in_a_browser.py``
uses it."""

import re

import pytest
from fastapi.testclient import TestClient

from tests.helpers.told_engine import ToldEngine, client_of
from toolkit import AsyncEngine, Engine
from toolkit.serving.app import ServerConfig, create_app
from toolkit.serving.page.content import page_files
from toolkit.testing.models import random_model, tiny_tokenizer

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def test_browsers_get_the_page_and_others_a_line():
    client, _ = client_of(ToldEngine(), api_key="secret")
    with client:
        assert client.get("/").text.startswith("toolkit ")
        assert client.head("/").status_code == 200
        page = client.get("/", headers=BROWSER)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'self'" in page.headers["content-security-policy"]
        named = re.findall(r'(?:href|src)="([^"]+)"', page.text)
        assert named
        for path in named:
            assert client.get(f"/{path}").status_code == 200, path
        for name in page_files():
            assert client.get(f"/page/{name}").headers["x-content-type-options"] == "nosniff"


def test_a_server_without_the_page():
    client, _ = client_of(ToldEngine(), page=False)
    with client:
        assert client.get("/", headers=BROWSER).text.startswith("toolkit ")
        assert client.get("/page/app.js").status_code == 404


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_the_page_of_the_documents_and_its_files(prefix):
    client, _ = client_of(ToldEngine(), root_path=prefix)
    with client:
        page = client.get(f"{prefix}/docs")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'self'" in page.headers["content-security-policy"]
        named = re.findall(r'(?:href|src)="([^"]+)"', page.text)
        assert {"docs/docs.js", "docs/docs.css", "openapi.json"} == set(named)
        for path in named:
            assert client.get(f"{prefix}/{path}?name=x").status_code == 200, path
        assert client.get("/redoc").status_code == 404


@pytest.mark.parametrize(("folder", "name"), [(one, name) for one in ("files", "docs") for name in page_files(one)])
def test_nothing_is_loaded_from_elsewhere(folder, name):
    text = page_files(folder)[name].decode()
    assert "//" not in re.sub(r"(?m)(^|[;{\s])//.*$", "", text)  # comments apart
    for module in re.findall(r'from "([^"]+)"', text):
        assert module.removeprefix("./") in page_files(folder)
    if name.endswith(".html"):
        assert not re.search(r"<script(?![^>]*\bsrc=)|\bon\w+=|\bstyle=", text)  # the policy refuses what is inline


def test_the_blocks_that_the_page_shows():
    tokenizer = tiny_tokenizer()
    engine = Engine(random_model("llama"), tokenizer, num_blocks=600, block_size=4)
    config = ServerConfig("tiny", AsyncEngine(engine), tokenizer=tokenizer, max_model_len=256, api_key="secret")
    with TestClient(create_app(config)) as client:
        assert client.get("/page/blocks").status_code == 401
        client.headers["authorization"] = "Bearer secret"
        shared = list(range(5, 13))
        for tail in ([20, 21, 22, 23], [30, 31, 32, 33]):
            client.post("/v1/completions", json={"prompt": shared + tail, "max_tokens": 1}).raise_for_status()
        (group,) = client.get("/page/blocks").json()["groups"]
    assert (group["block_size"], group["per_cell"], len(group["cells"])) == (4, 3, 200)
    assert sum(held for held, _ in group["cells"]) == 0
    assert sum(cached for _, cached in group["cells"]) == 4
    assert [(run["depth"], run["blocks"], run["held"]) for run in group["runs"]] == [
        (0, 2, False), (1, 1, False), (1, 1, False)
    ]  # fmt: skip


def test_without_the_page_there_are_no_blocks_to_show():
    client, _ = client_of(ToldEngine(), page=False)
    with client:
        assert client.get("/page/blocks").status_code == 404
