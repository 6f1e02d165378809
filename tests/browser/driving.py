"""Actions of the browser tests."""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page, expect

PATIENCE = 60_000  # milliseconds: the machine may be busy


def set_number(page: Page, label: str, value: float) -> None:
    """Set a number field, or the number beside a slider."""
    field = page.locator("input[type=number]:visible").and_(page.get_by_label(label, exact=False)).first
    field.fill(str(value))
    field.press("Tab")


def open_details(page: Page) -> None:
    """Show the fields for size, steps and seed."""
    page.get_by_role("button", name="Size, steps and seed").locator("visible=true").first.click()
    expect(page.get_by_label("Width").locator("visible=true")).to_be_visible()
    page.wait_for_timeout(500)  # text typed into a field that has just appeared is lost


def set_drawing(page: Page, *, side: int = 256, steps: int = 2, seed: int = 0, prompt: str | None = None) -> None:
    """Open the details and make the picture small and quick."""
    if not page.get_by_label("Width", exact=True).is_visible():
        open_details(page)
    for label, value in {"Width": side, "Height": side, "Seed": seed, "Steps": steps}.items():
        set_number(page, label, value)
    if prompt is not None:
        page.get_by_label("Prompt").first.fill(prompt)


def choose_attention(page: Page, name: str) -> None:
    """Select an attention by its label, or the part of it before the colon."""
    page.get_by_label("Attention to compare").first.click()
    page.get_by_role("option", name=re.compile(f"^{name}(:|$)")).click()


def draw_button(page: Page) -> Locator:
    return page.get_by_role("button", name="Draw both")


def status(page: Page) -> Locator:
    return page.locator("#compare-status")


def draw(page: Page) -> None:
    """Press the button and wait for both pictures."""
    draw_button(page).click()
    expect(status(page)).to_contain_text(re.compile("Starting|Waiting|Drawing"), timeout=PATIENCE)
    expect(status(page)).to_contain_text("Done.", timeout=PATIENCE)


def pictures(page: Page) -> list[np.ndarray]:
    """Both pictures under the slider, (H, W, 3)."""
    images = page.get_by_test_id("imageslider-image")
    expect(images).to_have_count(2)
    answers = [page.request.get(images.nth(i).get_attribute("src")) for i in range(2)]
    return [np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB")) for answer in answers]


def choose_tab(page: Page, name: str) -> None:
    """Select a tab, also from the overflow menu of a narrow page."""
    tab = page.get_by_role("tab", name=name)
    if tab.count() == 0:
        page.get_by_role("button", name="More tabs").click()
        tab = page.locator(".overflow-dropdown").get_by_text(name)
    tab.click()
