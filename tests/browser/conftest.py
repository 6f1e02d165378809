"""Fixtures: one app process per session, started by its command, and pages in Debian's Chromium."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = "/usr/bin/chromium"

# The app's command. Each connection to another machine adds a line to a file.
_COMMAND = """
import sys
def note(event, arguments):
    if event not in ("socket.getaddrinfo", "socket.connect"):
        return
    host = arguments[0] if event == "socket.getaddrinfo" else arguments[1][0]
    if str(host) not in ("None", "localhost", "127.0.0.1", "0.0.0.0", "::1") and not str(host).startswith("/"):
        open(sys.argv[1], "a").write(f"{event} {host}\\n")
sys.addaudithook(note)
from dit_accel.cli.app import main
main(["demo", "--port", "0"])
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@dataclass
class App:
    url: str
    folder: Path  # temporary folder of the app
    seconds_to_usable: float  # from the printed address to an enabled button
    log: Path


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[App]:
    temporary, logs = tmp_path_factory.mktemp("app"), tmp_path_factory.mktemp("log")
    log, foreign = logs / "stderr", logs / "foreign"
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, str(foreign)], stdout=subprocess.PIPE, stderr=errors,
            text=True, env=environment, cwd=temporary,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        printed = time.monotonic()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found is not None, f"no address in {line!r}: {log.read_text()}"
        (folder,) = temporary.glob("dit-accel-*")
        yield App(found.group(), folder, _open(browser, found.group()) - printed, log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert not folder.exists(), "the app's folder was left behind"
    assert not foreign.exists(), f"the app turned to other machines: {foreign.read_text()}"
    beside = {path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor")}  # torch's own
    assert beside == set(), "something was written beside it"


def _open(browser: Browser, url: str) -> float:
    """Wait until the page is usable; return the time."""
    page = browser.new_page()
    page.goto(url)
    expect(page.get_by_role("button", name="Draw both")).to_be_enabled(timeout=60_000)
    usable = time.monotonic()
    page.close()
    return usable


class Pages:
    """Open pages in separate browser contexts, and record requests to other hosts."""

    def __init__(self, app: App, browser: Browser) -> None:
        self.app, self.browser = app, browser
        self.foreign: list[str] = []
        self.contexts: list = []

    def open(self, width: int = 1366, height: int = 900, path: str = "/", **options: object) -> Page:
        context = self.browser.new_context(viewport={"width": width, "height": height}, **options)
        self.contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: self._note(request.url))
        page.goto(self.app.url + path)
        page.get_by_role("button", name="Draw both").wait_for()
        return page

    def _note(self, url: str) -> None:
        if not url.startswith((self.app.url + "/", "data:", "blob:")):
            self.foreign.append(url)


@pytest.fixture
def pages(app: App, browser: Browser) -> Iterator[Pages]:
    pages = Pages(app, browser)
    yield pages
    for context in pages.contexts:
        context.close()
    assert pages.foreign == [], "the page contacted another host"


@pytest.fixture
def page(pages: Pages) -> Page:
    return pages.open()
