"""Speed tab in the browser."""

import json
import re

import pytest
from driving import PATIENCE, choose_tab, draw_button, set_drawing, set_number
from driving import status as compare_status
from PIL import Image
from playwright.sync_api import expect


@pytest.fixture
def speed(page):
    return open_tab(page)


def open_tab(page):
    choose_tab(page, "Speed")
    expect(page.locator("#speed-run")).to_be_visible()
    return page


def status(page):
    return page.locator("#speed-status")


def measure(page, seconds):
    set_number(page, "Time limit", seconds)
    page.locator("#speed-run").click()


def curve(page):
    return page.locator("#speed-plot img")


def test_curve_grows_and_is_downloaded_as_png_and_json(speed, tmp_path):
    measure(speed, 6)
    expect(curve(speed)).to_be_visible(timeout=PATIENCE)
    expect(status(speed)).to_contain_text("Measured", timeout=PATIENCE)
    first = curve(speed).get_attribute("src")
    expect(curve(speed)).not_to_have_attribute("src", first, timeout=PATIENCE)
    expect(status(speed)).to_contain_text("Done.", timeout=PATIENCE)
    for name in ("SLA", "CLEAR", "LLSA", "GNA"):
        expect(speed.locator("#speed-sentences")).to_contain_text(
            re.compile(f"{name}: (no break-even within the measured sizes|faster than dense)")
        )
    for kind in ("png", "json"):
        with speed.expect_download() as download:
            speed.locator(f"#speed-{kind}").click()
        assert download.value.suggested_filename == f"speed.{kind}"
        download.value.save_as(tmp_path / f"speed.{kind}")
    content = json.loads((tmp_path / "speed.json").read_text())
    assert {row["attention"] for row in content["rows"]} == {"dense", "sla", "clear", "llsa", "gna"}
    assert content["status"] == "complete" and content["machine"]["device"] == "cpu"
    assert Image.open(tmp_path / "speed.png").size > (1000, 500)


def test_stop_keeps_the_measured_results(speed):
    measure(speed, 600)
    expect(status(speed)).to_contain_text("Measured", timeout=PATIENCE)
    speed.locator("#speed-cancel").click()
    expect(status(speed)).to_contain_text("Stopped.", timeout=PATIENCE)
    expect(speed.locator("#speed-json")).to_be_visible()
    expect(curve(speed)).to_be_visible()
    expect(speed.locator("#speed-run")).to_be_enabled()


def test_other_requests_wait_for_the_measurement(pages):
    speed, other = open_tab(pages.open()), pages.open()
    measure(speed, 600)
    expect(status(speed)).to_contain_text("Measured", timeout=PATIENCE)
    set_drawing(other, side=64)
    draw_button(other).click()
    expect(compare_status(other)).to_contain_text("Waiting", timeout=PATIENCE)
    speed.locator("#speed-cancel").click()
    expect(compare_status(other)).to_contain_text("Done.", timeout=PATIENCE)


def test_empty_selection_gives_a_message(speed):
    for name in ("SLA", "CLEAR", "LLSA", "GNA"):
        speed.get_by_label(name, exact=True).locator("visible=true").uncheck()
    measure(speed, 5)
    expect(status(speed).get_by_role("alert")).to_contain_text("at least one mechanism", timeout=PATIENCE)


def test_narrow_screen_has_no_horizontal_overflow(pages):
    page = open_tab(pages.open(width=375, height=812))
    measure(page, 5)
    expect(status(page)).to_contain_text("Done.", timeout=PATIENCE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
