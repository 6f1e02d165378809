"""Draw the demo app into assets/app-*.png: run it on the CPU, use it in headless Chromium, and take screenshots.

    python docs/tools/draw_app.py                   # all pictures: a quarter of an hour with one thread
    python docs/tools/draw_app.py speed convert     # some of them

The pictures show real runs, so their times hold for this machine: nothing else should be running on it. Set
OMP_NUM_THREADS to limit its threads. Needs dit-accel[demo], dit-accel-demo, playwright and Debian's Chromium.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
APP = "from dit_accel.cli.app import main; main(['demo', '--device', 'cpu', '--port', '0'])"
MINUTE = 60_000  # in milliseconds


def look(page: Page) -> None:
    """Inspect a token on the left of the white square."""
    page.get_by_role("tab", name="Look inside").click()
    run(page, "look", "Click on a place")
    expect(page.locator("#look-coverage img")).to_be_visible(timeout=MINUTE)
    picture, other = page.locator("#look-picture img"), page.locator("#look-other img")
    before, size = other.get_attribute("src") or "", picture.bounding_box() or {}
    picture.click(position={"x": 0.3 * size["width"], "y": 0.35 * size["height"]})
    expect(other).not_to_have_attribute("src", before, timeout=MINUTE)
    finish(page, "look", "Click on a place")


def speed(page: Page) -> None:
    page.get_by_role("tab", name="Speed").click()
    run(page, "speed")
    expect(page.locator("#speed-sentences")).not_to_contain_text("Do not rely on these times")


def convert(page: Page) -> None:
    page.get_by_role("tab", name="Convert").click()
    run(page, "convert")
    expect(page.locator("#convert-now img")).to_be_visible()


# Actions, width and height in pixels.
PICTURES: dict[str, tuple[Callable[[Page], None], int, int]] = {
    "compare": (lambda page: run(page, "compare"), 1366, 1626),
    "look": (look, 1366, 1984),
    "speed": (speed, 1366, 1189),
    "convert": (convert, 1366, 1102),
}


def run(page: Page, tab: str, message: str = "Done.") -> None:
    page.locator(f"#{tab}-run").click()
    finish(page, tab, message)


def finish(page: Page, tab: str, message: str) -> None:
    """Wait for the final status of a tab. Raises: AssertionError: it does not come, or there is a problem."""
    page.wait_for_timeout(1000)  # until the previous status is replaced
    expect(page.locator(f"#{tab}-status")).to_contain_text(message, timeout=20 * MINUTE)
    expect(page.locator(".problem")).to_have_count(0)


@contextmanager
def serve() -> Iterator[str]:
    """Run the app in the root, so that its paths are relative to it; yield its address."""
    process = subprocess.Popen([sys.executable, "-c", APP], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        yield re.findall(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
    finally:
        process.terminate()
        process.wait(30)


def draw(name: str, browser: Browser, address: str) -> None:
    """Write a picture. Raises: AssertionError: the page does not fit, or the app reports a problem."""
    act, width, height = PICTURES[name]
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(f"{address}/?__theme=light")
    expect(page.locator("#compare-run")).to_be_enabled(timeout=MINUTE)
    act(page)
    page.mouse.move(1, 1)  # no element is hovered
    page.evaluate("document.activeElement.blur()")
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_timeout(2000)  # animations
    footer = page.locator("footer").bounding_box() or {}
    end = footer["y"] + footer["height"]
    assert end <= height, f"expected a page of at most {height} pixels, got {end:.0f}: raise the height in PICTURES"
    picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
    path = ROOT / f"assets/app-{name}.png"
    picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    print(path, f"{path.stat().st_size:,} bytes")
    page.close()


def main() -> int:
    with serve() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for name in sys.argv[1:] or PICTURES:
            draw(name, browser, address)
    return 0


if __name__ == "__main__":
    sys.exit(main())
