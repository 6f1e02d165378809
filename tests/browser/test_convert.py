"""Convert tab in the browser: a conversion is stopped, resumed and selected in Compare."""

import json
import re

import numpy as np
from driving import PATIENCE, choose_attention, draw, pictures, set_drawing, set_number
from playwright.sync_api import Page, expect
from safetensors import safe_open

LONG = 3 * PATIENCE


def open_tab(page: Page) -> None:
    page.get_by_role("tab", name="Convert").click()
    expect(page.locator("#convert-run")).to_be_visible()


def status(page: Page):
    return page.locator("#convert-status")


def plot(page: Page, name: str) -> str | None:
    """Source of the current picture of a plot."""
    image = page.locator(f"#convert-{name} img")
    return image.get_attribute("src") if image.count() else None


def test_conversion_is_stopped_resumed_downloaded_and_selected(page, tmp_path):
    open_tab(page)
    expect(page.locator("#convert-estimate")).to_contain_text(re.compile(r"about \d+ (s|min)"))
    set_number(page, "Steps", 4)
    expect(page.locator("#convert-estimate")).to_contain_text(re.compile(r"about \d+ s"))
    page.locator("#convert-run").click()
    expect(status(page)).to_contain_text(re.compile("Step 1 of 4 · about .* left"), timeout=LONG)
    first = {name: plot(page, name) for name in ("loss", "distance")}
    for name in ("teacher", "before"):
        expect(page.locator(f"#convert-{name} img")).to_be_visible()
    expect(status(page)).to_contain_text("Step 2 of 4", timeout=LONG)
    page.locator("#convert-cancel").click()
    expect(status(page)).to_contain_text(re.compile(r"Stopped at step [23]\."), timeout=PATIENCE)
    assert all(plot(page, name) not in (None, src) for name, src in first.items())  # the curves moved
    expect(page.locator("#convert-restart")).to_be_enabled()

    page.locator("#convert-run").click()
    expect(status(page)).to_contain_text(re.compile("Step [23] of 4"), timeout=LONG)
    expect(status(page)).to_contain_text("Done.", timeout=LONG)
    expect(page.locator("#convert-now img")).to_be_visible()
    expect(page.locator("#convert-result")).to_contain_text(re.compile(r"distance to dense went from .* % to .* %"))
    expect(page.locator("#convert-command")).to_contain_text("dit-accel convert --attn clear:radius=11.5")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download dit_accel.safetensors").click()
    assert download.value.suggested_filename == "dit_accel.safetensors"
    download.value.save_as(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        about = json.loads(file.metadata()["dit_accel"])
        assert (
            about["components"]["transformer"]["attention"][0]["mechanism"] == "clear" and len(list(file.keys())) > 10
        )

    page.get_by_role("tab", name="Compare").click()
    choose_attention(page, r"CLEAR, converted here \(clear, 4 steps\)")
    set_drawing(page)
    draw(page)
    dense, converted = pictures(page)
    assert dense.shape == converted.shape and not np.array_equal(dense, converted)
    expect(page.locator("#compare-code")).to_contain_text("load_attention")


def test_invalid_options_give_messages(page):
    open_tab(page)
    page.locator("#convert-prompts textarea").fill("  ")
    page.locator("#convert-run").click()
    expect(status(page)).to_contain_text("The prompt is empty")
    page.locator("#convert-prompts textarea").fill("a red circle")
    set_number(page, "Learning rate", -1)
    page.locator("#convert-run").click()
    expect(status(page)).to_contain_text("learning rate must be above 0")
    expect(page.locator("#convert-run")).to_be_enabled()
