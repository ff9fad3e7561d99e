"""The live page in a real browser: a run is watched, a link is cut by a click and healed, and strangers see nothing."""

import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.isthmus_runs import QUICK, started

playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs: pip install playwright")
pytest.importorskip("starlette", reason="the page needs isthmus[web]")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the browser test needs Debian's chromium")

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
WAIT_MS = 60_000
expect = playwright.expect


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(cache: Path, tmp_path: Path) -> Iterator[Path]:
    """A run of two nodes that goes on for as long as the test, with its page."""
    wanted = ["--coordinator.nodes", "2", "--run.outputs", tmp_path, "--run.name", "watched", "--run.trace", "4"]
    long = ["--train.steps", "100000", "--net.profile", "internet-300mbps", "--train.eval_every", "6"]
    arguments = ["run", "configs/tiny.toml", "--dashboard", "127.0.0.1:0", *QUICK, *wanted, *long]
    with started(cache, tmp_path / "log", *arguments):
        run = tmp_path / "watched"
        deadline_s = time.monotonic() + 60
        while not (run / "dashboard.links").exists():
            assert time.monotonic() < deadline_s, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield run


def links(folder: Path) -> tuple[str, str]:
    read, control = re.findall(r"http://\S+", (folder / "dashboard.links").read_text())
    return read, control


def test_a_person_watches_cuts_and_heals(folder: Path, tmp_path: Path) -> None:
    read, control = links(folder)
    with playwright.sync_playwright() as started_playwright:
        browser = started_playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        faults: list[str] = []
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.set_default_timeout(WAIT_MS)

        page.goto(control)
        expect(page.locator("[data-figure=step]")).to_have_text(re.compile(r"^([6-9]|\d\d+) of"), timeout=WAIT_MS)
        assert "#" not in page.url, "the secret stays in the address"
        assert page.locator("#loss canvas").count() == 1
        assert page.locator("#map .link").count() == 2

        page.locator('[data-link="node-0 node-1"]').click(force=True)
        page.locator("#kind").select_option("cut")
        page.locator("#apply").click()
        for name in ("node-0", "node-1"):
            page.locator(f'[data-confirmed="{name}"]').wait_for()
        page.screenshot(path=str(tmp_path / "cut.png"), full_page=True)
        page.locator("#kind").select_option("heal")
        page.locator("#apply").click()
        expect(page.locator("#apply")).to_be_enabled(timeout=WAIT_MS)
        page.locator("#marks", has_text="cut").wait_for()

        page.locator("#trace-step").select_option(index=0)
        page.reload()  # the session is a cookie: no secret is needed again
        page.locator("#trace-step").select_option("4")
        page.locator("#timeline rect").first.wait_for()
        page.locator("#energy rect").first.wait_for()
        assert faults == []

        reader = browser.new_context().new_page()
        reader.set_default_timeout(WAIT_MS)
        reader.goto(read)
        reader.locator("#map .link").first.wait_for(state="attached")
        assert reader.locator("#controls").is_hidden()

        stranger = browser.new_context().new_page()
        stranger.goto(read.partition("#")[0])
        stranger.locator("#login").wait_for()
        stranger.locator("#secret").fill("guess")
        stranger.locator("#login button").click()
        stranger.locator("#login-error", has_text="opens nothing").wait_for()
        assert stranger.locator("main").is_hidden()
        browser.close()

    assert status(read, "/api/run") == 401
    assert status(read, "/", host="evil.example") == 403
    metrics = fetch(read, "/metrics", read.partition("#")[2])
    assert b"isthmus_link_busy_ratio" in metrics


def request(link: str, path: str, **headers: str) -> urllib.request.Request:
    return urllib.request.Request(link.partition("/#")[0] + path, headers=headers)


def status(link: str, path: str, host: str | None = None) -> int:
    wanted = request(link, path, **({"Host": host} if host else {}))
    try:
        with urllib.request.urlopen(wanted, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def fetch(link: str, path: str, secret: str) -> bytes:
    with urllib.request.urlopen(request(link, path, Authorization=f"Bearer {secret}"), timeout=10) as answer:
        content: bytes = answer.read()
    return content
