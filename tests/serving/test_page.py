"""The page at ``/``: who gets it, and that nothing of it comes from elsewhere. ``tests/soak/test_page_in_a_browser.py``
uses it."""

import re

import pytest

from tests.helpers.told_engine import ToldEngine, client_of
from toolkit.serving.page.routes import page_files

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


@pytest.mark.parametrize("name", page_files())
def test_nothing_is_loaded_from_elsewhere(name):
    text = page_files()[name].decode()
    assert "//" not in re.sub(r"(?m)(^|[;{\s])//.*$", "", text)  # comments apart
    for module in re.findall(r'from "([^"]+)"', text):
        assert module.removeprefix("./") in page_files()
    if name.endswith(".html"):
        assert not re.search(r"<script(?![^>]*\bsrc=)|\bon\w+=|\bstyle=", text)  # the policy refuses what is inline
