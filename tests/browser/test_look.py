"""Look inside tab in the browser."""

import io
import re

import numpy as np
import pytest
from driving import PATIENCE, choose_tab, open_details, set_drawing, set_number
from PIL import Image
from playwright.sync_api import expect


@pytest.fixture
def look(page):
    return open_tab(page)


def open_tab(page):
    choose_tab(page, "Look inside")
    expect(page.locator("#look-run")).to_be_visible()
    open_details(page)
    return page


def status(page):
    return page.locator("#look-status")


def draw(page, **options):
    set_drawing(page, **options)
    for label in ("Width", "Height"):
        assert number(page, label) == options.get("side", 256)
    page.locator("#look-run").click()
    wait_until_inspected(page)


def wait_until_inspected(page):
    expect(status(page)).to_contain_text("Click on a place", timeout=PATIENCE)
    expect(page.locator("#look-coverage img")).to_be_visible(timeout=PATIENCE)


def pixels(page, name):
    source = page.locator(f"#look-{name} img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB"))


def click_into(page, across, down, name="picture"):
    """Click at these fractions of the picture, and wait for the update."""
    picture = page.locator(f"#look-{name} img")
    before, size = page.locator("#look-other img").get_attribute("src"), picture.bounding_box()
    picture.click(position={"x": across * size["width"], "y": down * size["height"]})
    changed(page, "other", before)


def changed(page, name, before):
    expect(page.locator(f"#look-{name} img")).not_to_have_attribute("src", before, timeout=PATIENCE)
    wait_until_inspected(page)


def ring(page):
    """Row and column of the centre of the ring, as fractions of the picture."""
    found = np.argwhere((pixels(page, "picture") == (80, 255, 120)).all(-1))
    return (found.mean(0) / pixels(page, "picture").shape[:2]).round(2).tolist()


def test_click_shows_the_attention_of_the_token(look):
    draw(look)
    first = pixels(look, "other")
    click_into(look, 0.25, 0.75)
    assert ring(look) == pytest.approx([0.75, 0.25], abs=0.03)
    assert not np.array_equal(pixels(look, "other"), first)
    assert not np.array_equal(pixels(look, "other"), pixels(look, "dense"))
    assert (pixels(look, "other") == (120, 220, 255)).all(-1).any(), "the attended tokens have no outline"
    expect(look.locator("#look-summary")).to_contain_text(re.compile(r"row 2\d of 32, column \d of 32"))
    expect(look.locator("#look-summary")).to_contain_text("dense attention covered")
    expect(look.locator("#look-map img")).to_be_visible()
    click_into(look, 0.5, 0.25, name="dense")
    assert ring(look) == pytest.approx([0.25, 0.5], abs=0.03)


def test_sliders_select_the_same_token_as_a_click(look):
    draw(look)
    click_into(look, 0.25, 0.25)
    clicked, x = pixels(look, "other"), number(look, "pixels from the left")
    assert abs(x - 64) <= 1
    before = look.locator("#look-other img").get_attribute("src")
    set_number(look, "pixels from the left", 200)
    changed(look, "other", before)
    assert ring(look)[1] == pytest.approx(200 / 256, abs=0.03)
    before = look.locator("#look-other img").get_attribute("src")
    set_number(look, "pixels from the left", x)
    changed(look, "other", before)
    assert np.array_equal(pixels(look, "other"), clicked)


def number(page, label):
    return int(page.locator("input[type=number]:visible").and_(page.get_by_label(label)).first.input_value())


def test_mechanism_layer_step_and_head_can_be_selected(look):
    draw(look, steps=3)
    click_into(look, 0.3, 0.3)
    before = look.locator("#look-other img").get_attribute("src")
    choose_in_tab(look, "CLEAR")
    changed(look, "other", before)
    expect(look.locator("#look-summary")).to_contain_text("CLEAR")
    expect(look.locator("#look-map")).to_be_hidden()
    dense = pixels(look, "dense")
    for act in (
        lambda: choose_layer(look, "2: "),
        lambda: look.locator("#look-step").get_by_label("3", exact=True).check(),
        lambda: set_number(look, "Head", 2),
    ):
        before = look.locator("#look-dense img").get_attribute("src")
        act()
        changed(look, "dense", before)
        assert not np.array_equal(pixels(look, "dense"), dense)
        dense = pixels(look, "dense")
    before = look.locator("#look-other img").get_attribute("src")
    choose_in_tab(look, "LLSA")
    changed(look, "other", before)
    expect(look.locator("#look-map img")).to_be_visible()


def choose_in_tab(page, name):
    page.locator("#look-mechanism input").first.click()
    page.get_by_role("option", name=re.compile(f"^{name}\\b")).click()


def choose_layer(page, name):
    page.locator("#look-layer input").first.click()
    page.get_by_role("option", name=re.compile(f"^{name}")).click()


def test_clip_has_a_slider_for_its_frames(look):
    look.locator("label:visible", has_text="Video").click()
    expect(look.get_by_label("Prompt").locator("visible=true")).to_have_value(re.compile("moving"))
    set_drawing(look, side=128)
    set_number(look, "Frames", 9)
    draw(look, side=128)
    assert len(ring(look)) == 2
    before = look.locator("#look-picture img").get_attribute("src")
    set_number(look, "Frame of tokens shown", 1)
    changed(look, "picture", before)
    assert not (pixels(look, "picture") == (80, 255, 120)).all(-1).any()  # the query token is in another frame
    click_into(look, 0.5, 0.5)
    assert len(ring(look)) == 2
    expect(look.locator("#look-summary")).to_contain_text(re.compile(r"frame 1 of \d+"))


def test_cancel_stops_and_another_drawing_can_start(look):
    set_drawing(look, side=512, steps=60)
    look.locator("#look-run").click()
    expect(status(look)).to_contain_text(re.compile(r"step [1-9]"), timeout=PATIENCE)
    look.locator("#look-cancel").click()
    expect(status(look)).to_have_text("Stopped.", timeout=PATIENCE)
    expect(look.locator("#look-results")).to_be_hidden()
    draw(look)


def test_pages_inspect_their_own_drawings(pages):
    prompts = ("three yellow triangles in a row on an orange background", "a blue circle on a white background")
    both = [open_tab(pages.open()) for _ in prompts]
    alone = []
    for page, prompt in zip(both, prompts, strict=True):
        set_drawing(page)
        page.get_by_label("Prompt").locator("visible=true").fill(prompt)
    for page in both:
        page.locator("#look-run").click()
    for page in both:
        wait_until_inspected(page)
        alone.append(pixels(page, "dense"))
    assert not np.array_equal(*alone)
    for page in both:
        click_into(page, 0.2, 0.2)
    for page, before in zip(both, alone, strict=True):
        click_into(page, 0.502, 0.502)
        assert np.array_equal(pixels(page, "dense"), before)


def test_invalid_input_gives_messages(look):
    look.get_by_label("Prompt").locator("visible=true").fill(" ")
    look.locator("#look-run").click()
    expect(status(look).get_by_role("alert")).to_contain_text("The prompt is empty", timeout=PATIENCE)
    look.get_by_label("Prompt").locator("visible=true").fill("a red circle")
    draw(look, side=64)
    choose_in_tab(look, "GNA")
    set_number(look, "Window, in tokens", 40)
    expect(status(look).get_by_role("alert")).to_contain_text("larger than the grid of 8×8", timeout=PATIENCE)
    set_number(look, "Window, in tokens", 5)
    wait_until_inspected(look)


def test_narrow_screen_stacks_all_parts(pages):
    page = open_tab(pages.open(width=375, height=812))
    draw(page)
    boxes = [page.locator(f"#look-{name}").bounding_box() for name in ("picture", "dense", "other")]
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"] and boxes[1]["y"] < boxes[2]["y"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
