"""Messages for invalid input; the page works afterwards."""

import pytest
from driving import choose_attention, draw, draw_button, set_drawing, set_number, status
from playwright.sync_api import expect


def empty(page):
    set_drawing(page, prompt="   ")


def long(page):
    set_drawing(page, prompt="a red circle " * 770)


def odd_size(page):
    set_drawing(page, side=250)


def huge(page):
    set_drawing(page, side=8192)


def no_size(page):
    set_drawing(page)
    page.get_by_label("Width", exact=True).fill("")
    page.get_by_label("Width", exact=True).press("Tab")


def negative_seed(page):
    set_drawing(page, seed=-1)


def large_window(page):
    set_drawing(page, side=128)
    choose_attention(page, "GNA")
    set_number(page, "Window, in tokens", 40)


def large_stride(page):
    set_drawing(page)
    choose_attention(page, "GNA")
    set_number(page, "Window, in tokens", 4)
    set_number(page, "Stride, in tokens", 8)


MESSAGES = {
    empty: "The prompt is empty",
    long: "10,009 characters",
    odd_size: "nearest: 248×248 or 256×256",
    huge: "too large for this page",
    no_size: "The width must be an integer",
    negative_seed: "The seed must be from 0",
    large_window: "larger than the grid of 16×16 tokens",
    large_stride: "stride 8 is larger than window 4",
}


@pytest.mark.parametrize("wrong", MESSAGES)
def test_bad_input_gives_a_message_and_the_page_keeps_working(page, wrong):
    wrong(page)
    draw_button(page).click()
    problem = status(page).get_by_role("alert")
    expect(problem).to_contain_text(MESSAGES[wrong])
    assert "Traceback" not in page.locator("body").inner_text()
    expect(draw_button(page)).to_be_enabled()
    page.reload()
    draw_button(page).wait_for()
    set_drawing(page, side=128, steps=1)
    draw(page)
