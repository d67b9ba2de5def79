"""The page of a real run in headless Chromium while it trains: curves that grow, completions of several steps side by
side, blocks, experts, keys; and the same page beside a served model."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.server_process import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
STEPS = 60
TRAIN = ("objective.warmup.max_steps=60", "objective.evaluation.max_eval_samples=16", f"train.max_steps={STEPS}",
         "checkpoint.save_steps=20", "log.report_to=none", "log.plot=false", "log.details_steps=5",
         "log.num_completions=6")  # fmt: skip


def toolkit(*words, **options):
    return subprocess.Popen([sys.executable, "-m", "toolkit.cli", *words], stdout=subprocess.PIPE, text=True, **options)


@pytest.fixture
def page(tmp_path):
    sync = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    folder = tmp_path / "moe_grpo"
    folder.mkdir()
    watching = toolkit("watch", str(folder), "--port", "0")
    training = toolkit("train", "moe_grpo", *TRAIN, f"output_dir={tmp_path}")
    try:
        with sync.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            found = browser.new_page(viewport={"width": 1280, "height": 900})
            found.url_of_run = watching.stdout.readline().split()[-1]
            found.problems, found.folder = [], folder
            found.watching, found.training, found.browser = watching, training, browser
            found.on("pageerror", lambda error: found.problems.append(str(error)))
            found.on("request", lambda one: found.problems.append(one.url) if "127.0.0.1" not in one.url else None)
            found.goto(found.url_of_run)
            yield found
            browser.close()
    finally:
        for process in (watching, training):
            process.kill()
            process.wait()


def until(page, holds):
    """Wait until ``holds()``; the page's policy forbids to evaluate text in it."""
    for _ in range(6000):
        if holds():
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"it never held; the page says {page.text_content('#state')!r}")


def kept(page, name):
    """A screenshot, where the documentation's are made anew."""
    folder = os.environ.get("TOOLKIT_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def last_step(page):
    line = page.text_content("#state").replace(",", "").split()
    return int(line[1]) if line[:1] == ["step"] else 0


def headings(page):
    found = page.locator("#steps h2")
    return [found.nth(at).text_content() for at in range(found.count())]


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_run_is_watched_while_it_trains(page):
    page.wait_for_selector("#state")
    until(page, lambda: last_step(page) >= 3)
    first = last_step(page)
    assert first < STEPS
    until(page, lambda: last_step(page) > first)  # the run trains, and the page follows
    names = page.locator("figure.chart")
    shown = [names.nth(at).get_attribute("data-name") for at in range(names.count())]
    assert shown[:5] == ["loss", "reward", "accuracy", "mismatch_kl", "mismatch_bits"]
    assert {"tokens_per_second", "expert_load_max"} <= set(shown)
    lengths = [len(page.locator("figure.chart .each").first.get_attribute("d"))]
    until(page, lambda: len(page.locator("figure.chart .each").first.get_attribute("d")) > lengths[0])

    until(page, lambda: last_step(page) == STEPS and "finished" in page.text_content("#state"))
    lines = [json.loads(line) for line in (page.folder / "details.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert headings(page) == [f"step {steps[-1]}"]
    texts = page.locator("#steps .tokens")
    assert [texts.nth(at).text_content() for at in range(texts.count())] == [
        one["completion"] for one in lines[-1]["completions"]
    ]
    assert "mismatch_bits: 0 at the end" in page.get_attribute("figure[data-name=mismatch_bits] svg", "aria-label")
    assert page.locator(".load div").count() == 3
    assert page.locator(".load span").count() == 3 * 8
    assert page.locator("#blocks .cells .held").count() > 0
    assert page.locator("#blocks .runs li").count() > 1

    page.keyboard.press("Home")
    until(page, lambda: headings(page) == ["step 1"])
    page.keyboard.press("c")
    page.keyboard.press("Shift+ArrowRight")
    until(page, lambda: headings(page) == ["step 1", f"step {steps[1]}"])
    page.keyboard.press("c")
    page.keyboard.press("End")
    until(page, lambda: headings(page) == ["step 1", f"step {steps[1]}", f"step {steps[-1]}"])
    kept(page, "watch")
    page.keyboard.press("Escape")
    until(page, lambda: len(headings(page)) == 1)
    page.keyboard.press("ArrowLeft")
    until(page, lambda: page.get_attribute("#step", "aria-valuetext") == f"step {STEPS - 1}")
    page.uncheck("#names input[value=loss]")
    until(page, lambda: page.locator("figure[data-name=loss]").count() == 0)
    assert not page.problems

    page.watching.send_signal(signal.SIGINT)
    assert page.watching.wait(timeout=60) == 0
    assert page.training.wait(timeout=300) == 0
    with serving(page.folder, "--port", "0", "--watch", str(page.folder), "--api-key", "secret") as server:
        page.goto(server.url)
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        page.click("text=Training")
        until(page, lambda: headings(page) == [f"step {steps[-1]}"])
        page.click("text=Chat")
        page.wait_for_selector("#prompt")
    assert not page.problems
