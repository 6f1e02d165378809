"""Compare tab in the browser."""

import re
import time

import numpy as np
import pytest
from driving import PATIENCE, choose_attention, draw, draw_button, pictures, set_drawing, set_number, status
from playwright.sync_api import expect

LONG = {"side": 512, "steps": 60}


def start_long_drawing(page):
    set_drawing(page, **LONG)
    draw_button(page).click()
    expect(status(page)).to_contain_text(re.compile(r"step [1-9]"), timeout=PATIENCE)


def test_page_is_usable_soon_after_start(app):
    assert app.seconds_to_usable < 5


def test_example_shows_both_pictures_figures_and_python_code(page):
    page.get_by_role("button", name="three yellow triangles").click()
    expect(page.get_by_label("Prompt").first).to_have_value("three yellow triangles in a row on an orange background")
    set_drawing(page)
    draw(page)
    dense, other = pictures(page)
    assert dense.shape == other.shape == (256, 256, 3)
    assert not np.array_equal(dense, other)
    figures = page.locator("#compare-figures")
    for words in ("seconds per step", "× dense", "logits computed", "PSNR", "SSIM", " dB"):
        expect(figures).to_contain_text(words)
    expect(page.locator("#compare-code")).to_contain_text(
        "pipe.set_attn_processor(dit_accel.SLAAttnProcessor(critical=0.1"
    )


def test_slider_moves_the_border_between_the_pictures(page):
    set_drawing(page)
    draw(page)
    right = page.get_by_test_id("imageslider-image").nth(1)
    before = right.evaluate("image => image.style.clipPath")
    box = page.locator("#compare-slider .slider-wrap").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.3, middle, steps=5)
    page.mouse.up()
    dragged = right.evaluate("image => image.style.clipPath")
    assert dragged != before
    page.get_by_role("slider", name="Border between the two").focus()
    page.keyboard.press("ArrowRight")
    expect(right).not_to_have_css("clip-path", dragged)


def test_preview_changes_while_drawing(page):
    set_drawing(page, side=512, steps=8)
    draw_button(page).click()
    expect(page.get_by_test_id("imageslider-image").first).to_be_visible(timeout=PATIENCE)
    expect(status(page)).to_contain_text(
        re.compile(r"Drawing with dense attention: step [2-8] of 8 · about \d+ s left")
    )
    expect(status(page).get_by_role("progressbar")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(status(page)).to_have_text("Stopped.", timeout=PATIENCE)


def test_other_attention_shows_its_own_sliders(page):
    set_drawing(page)
    draw(page)
    dense, sla = pictures(page)
    expect(page.get_by_label("Critical fraction").first).to_be_visible()
    choose_attention(page, "CLEAR")
    expect(page.get_by_label("Critical fraction").first).to_be_hidden()
    set_number(page, "Radius, in tokens", 4)
    draw(page)
    again, clear = pictures(page)
    assert np.array_equal(dense, again) and not np.array_equal(sla, clear)
    expect(page.locator("#compare-code")).to_contain_text("CLEARAttnProcessor(radius=4")


def test_converted_weights_can_be_selected(page):
    page.get_by_label("Attention to compare").first.click()
    trained = page.get_by_role("option", name="SLA, trained")
    trained.click()
    expect(page.get_by_label("Critical fraction").first).to_be_hidden()
    set_drawing(page, side=512, steps=1)
    draw(page)
    expect(page.locator("#compare-code")).to_contain_text("dit_accel.load_attention(pipe, ")


def test_cancel_stops_and_another_drawing_can_start(page):
    start_long_drawing(page)
    page.get_by_role("button", name="Cancel").click()
    began = time.monotonic()
    expect(status(page)).to_have_text("Stopped.", timeout=PATIENCE)
    assert time.monotonic() - began < 15  # the whole drawing takes minutes
    set_drawing(page)
    draw(page)
    assert len(pictures(page)) == 2


def test_closing_a_page_frees_its_turn(pages):
    first, second = pages.open(), pages.open()
    start_long_drawing(first)
    set_drawing(second)
    draw_button(second).click()
    expect(status(second)).to_have_text("Waiting: one request is before yours.", timeout=PATIENCE)
    first.close()
    expect(status(second)).to_contain_text("Done.", timeout=PATIENCE)


def test_waiting_request_is_cancelled_at_once(pages):
    first, second = pages.open(), pages.open()
    start_long_drawing(first)
    set_drawing(second)
    draw_button(second).click()
    expect(status(second)).to_contain_text("Waiting", timeout=PATIENCE)
    second.get_by_role("button", name="Cancel").click()
    expect(status(second)).to_have_text("Stopped.", timeout=5000)
    expect(status(first)).to_contain_text("Drawing")
    first.get_by_role("button", name="Cancel").click()
    expect(status(first)).to_have_text("Stopped.", timeout=PATIENCE)


def test_concurrent_pages_get_the_same_pictures_as_alone(pages):
    both = {"CLEAR": pages.open(), "LLSA": pages.open()}
    for name, page in both.items():
        set_drawing(page, seed=7)
        choose_attention(page, name)
    for page in both.values():
        draw_button(page).click()
    for page in both.values():
        expect(status(page)).to_contain_text("Done.", timeout=PATIENCE)
    together = {name: pictures(page) for name, page in both.items()}
    for name, page in both.items():
        draw(page)
        for alone, then in zip(pictures(page), together[name], strict=True):
            assert np.array_equal(alone, then)
    assert not np.array_equal(together["CLEAR"][1], together["LLSA"][1])


def test_clips_are_side_by_side_and_play_in_step(page):
    page.get_by_label("Video", exact=True).first.check()
    expect(page.get_by_label("Prompt").first).to_have_value(re.compile("moving"))
    set_drawing(page, side=128)
    set_number(page, "Frames", 9)
    draw(page)
    clips = page.locator("#compare-clips video")
    expect(clips).to_have_count(2)
    boxes = [clips.nth(i).bounding_box() for i in range(2)]
    assert abs(boxes[0]["y"] - boxes[1]["y"]) < 5 and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    first, second = clips.nth(0), clips.nth(1)
    first.evaluate("clip => clip.pause()")
    expect(second).to_have_js_property("paused", True)
    second.evaluate("clip => { clip.currentTime = 0.25 }")
    expect(first).to_have_js_property("currentTime", 0.25)
    second.evaluate("clip => clip.play()")
    expect(first).to_have_js_property("paused", False)
    page.wait_for_timeout(1500)
    apart = page.evaluate("() => { const [a, b] = document.querySelectorAll('#compare-clips video'); "
                          "return Math.abs(a.currentTime - b.currentTime) }")  # fmt: skip
    assert apart < 0.15


def test_comparison_works_by_keyboard(page):
    set_drawing(page)
    page.get_by_label("Prompt").first.focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        if draw_button(page).evaluate("button => button === document.activeElement"):
            break
    else:
        pytest.fail("the button cannot be reached")
    page.keyboard.press("Enter")
    expect(status(page)).to_contain_text("Done.", timeout=PATIENCE)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_narrow_screen_stacks_all_parts(pages, theme):
    page = pages.open(width=375, height=812, path=f"/?__theme={theme}")
    set_drawing(page)
    draw(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    button, slider = draw_button(page).bounding_box(), page.locator("#compare-slider").bounding_box()
    assert slider["y"] >= button["y"] + button["height"] and slider["width"] > 300
