"""Inspection of drawings: recordings per page, and mapping of pixels to tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_accel.common.errors import BadInput
from dit_accel.comparison.sizes import Size
from dit_accel.demo.ui import look_tab
from dit_accel.demo.ui.attention_maps import AttentionCall, Recording
from dit_accel.demo.ui.controls import DrawingOptions
from dit_accel.demo.ui.engine import Cancelled, Engine, Stop
from dit_accel.demo.ui.inspection import Drawings, Drawn, Position, Step, coverage_by_layer, draw, inspect_token
from dit_accel.demo.ui.plots import overlay, overlay_scale
from dit_accel.layout import TokenLayout
from dit_accel.mechanisms.attn_spec import parse_attention

CPU = torch.device("cpu")


def make_drawn(*grids, frames=1, heads=2, side=64, before=3):
    """Drawn result with one layer per grid."""
    calls = {}
    for i, grid in enumerate(grids):
        layout = TokenLayout(grid, before=before)
        generator = torch.Generator().manual_seed(i)
        query, key = (torch.randn(1, heads, layout.seq_len, 16, generator=generator) for _ in range(2))
        for step in (0, 3):
            calls[step, f"blocks.{i}"] = AttentionCall(query, key, layout, None, None)
    recording = Recording((0, 3), tuple(f"blocks.{i}" for i in range(len(grids))), 1 << 30, calls)
    picture = np.full((frames, side, side, 3), 200, np.uint8)
    kind = "image" if frames == 1 else "video"
    return Drawn(DrawingOptions(kind, "a red circle", 0, Size(side, side), 4), picture, recording)


def inspect(drawn, text="clear:radius=2", **position):
    place = {"step": 0, "layer": "blocks.0", "head": 0, "x": 0, "y": 0} | position
    return inspect_token(drawn, Position(**place), parse_attention(text), CPU)


def test_pixel_maps_to_a_token_of_the_layer_grid():
    drawn = make_drawn((8, 8), (4, 4))
    assert inspect(drawn, x=63, y=9).place == (1, 7)
    assert inspect(drawn, x=63, y=9, layer="blocks.1").place == (0, 3)
    assert inspect(drawn, x=999, y=-5).place == (0, 7)


def test_ring_is_shown_only_in_the_frame_of_the_query():
    drawn = make_drawn((5, 4, 4), frames=9)
    drawn.frames[4] = 10
    there = inspect(drawn, text="gna:window=3x3x3", x=20, y=40, frame=2, shown=2)
    elsewhere = inspect(drawn, text="gna:window=3x3x3", x=20, y=40, frame=2, shown=0)
    assert there.place == elsewhere.place == (2, 2, 1)
    assert there.picture[0, 0, 0] == 10 and elsewhere.picture[0, 0, 0] == 200
    rings = [(look.picture == (80, 255, 120)).all(-1).any() for look in (there, elsewhere)]
    assert rings == [True, False]
    assert there.attended.mask.shape == (5, 4, 4) and there.attended.mask[0].sum() == 0


def test_overlay_shows_the_weights_of_the_selected_frame():
    drawn = make_drawn((5, 4, 4), frames=9)
    pictures = [inspect(drawn, text="clear:radius=9", frame=2, shown=shown).dense for shown in range(5)]
    assert not any(np.array_equal(pictures[0], other) for other in pictures[1:])


def test_map_row_is_the_query_block_of_the_token():
    drawn = make_drawn((8, 8))
    found = inspect(drawn, text="sla:critical=0.3,block_q=16,block_kv=8", x=60, y=30)
    assert found.row == (3 * 8 + 7) // 16
    assert inspect(drawn).blocks is None


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("gna:window=9x9", {}, "larger than the grid"),
        ("clear:radius=2", {"head": 5}, "2 heads"),
        ("clear:radius=2", {"step": 1}, "not recorded"),
        ("clear:radius=2", {"layer": "other"}, "not recorded"),
    ],
)
def test_invalid_position_raises_a_clear_error(text, position, message):
    with pytest.raises(BadInput, match=message):
        inspect(make_drawn((8, 8)), text, **position)


def test_coverage_is_cached_and_can_be_stopped():
    drawn = make_drawn((8, 8), (4, 4))
    processor = parse_attention("clear:radius=2").processor()
    found = coverage_by_layer(drawn, 3, processor, CPU, Stop())
    assert list(found) == ["blocks.0", "blocks.1"]
    stop = Stop()
    stop.set()
    with pytest.raises(Cancelled):
        coverage_by_layer(drawn, 0, processor, CPU, stop)
    recording = dict(found)
    assert all(coverage_by_layer(drawn, 3, processor, CPU, Stop())[layer] is recording[layer] for layer in recording)


def test_each_page_has_its_own_drawing():
    drawings, one, other = Drawings(), make_drawn((4, 4)), make_drawn((4, 4))
    drawings.put("a", one)
    drawings.put("b", other)
    assert drawings.get("a") is one and drawings.get("b") is other
    drawings.drop("a")
    drawings.drop("a")
    with pytest.raises(BadInput, match="press Draw"):
        drawings.get("a")
    assert drawings.get("b") is other


def test_least_recently_used_drawing_is_dropped():
    each = make_drawn((4, 4)).n_bytes
    drawings = Drawings(max_bytes=int(2.5 * each))
    for page in "ab":
        drawings.put(page, make_drawn((4, 4)))
    drawings.get("a")
    drawings.put("c", make_drawn((4, 4)))
    drawings.get("a"), drawings.get("c")
    with pytest.raises(BadInput):
        drawings.get("b")
    drawings = Drawings(max_bytes=1)
    drawings.put("a", make_drawn((4, 4)))
    assert drawings.get("a").frames.any()  # a drawing above the limit by itself is kept


@pytest.fixture(scope="module")
def engine():
    with Engine(None, CPU, torch.float32) as engine:
        yield engine


def small(engine, steps=2):
    return DrawingOptions("image", engine.about("image").prompts[0], 0, Size(64, 64), steps)


def test_drawing_equals_the_pipeline_output_and_reports_steps(engine):
    events = []
    draw(engine, small(engine), Stop(), events.append)
    *news, drawn = events
    assert [event.step for event in news if isinstance(event, Step)] == [1, 2]
    with engine.turn("image") as loaded:
        wanted = small(engine)
        plain = engine.draw(loaded, wanted.prompt, wanted.seed, wanted.size, wanted.steps, Stop())
    assert np.array_equal(drawn.frames, plain.frames)
    assert len(drawn.layers) == 9 and drawn.recording.steps == (0, 1)
    found = inspect_token(drawn, Position(1, drawn.layers[0], 1, 20, 20), parse_attention("llsa"), CPU)
    assert found.layout.grid == (8, 8) and found.dense.shape == (512, 512, 3)


def test_stopped_drawing_keeps_no_recording(engine):
    stop = Stop()
    events = []

    def report(event):
        events.append(event)
        stop.set()

    with pytest.raises(Cancelled):
        draw(engine, small(engine, steps=5), stop, report)
    assert not any(isinstance(event, Drawn) for event in events) and len(events) < 3


def test_closing_a_page_drops_its_drawing(engine):
    import gradio as gr

    with gr.Blocks() as blocks:
        look_tab.build(engine)
    (forget,) = [one.fn for one in blocks.fns.values() if any(event == "unload" for _, event in one.targets)]
    drawings = forget.__self__.drawings
    drawings.put("page", make_drawn((4, 4)))
    forget(SimpleNamespace(session_hash="other"))
    assert drawings.get("page")
    forget(SimpleNamespace(session_hash="page"))
    with pytest.raises(BadInput):
        drawings.get("page")


def test_overlay_shows_weights_mask_and_query():
    picture = np.full((256, 256, 3), 100, np.uint8)
    weights = np.zeros((4, 4), np.float32)
    weights[1, 2] = 1
    mask = np.zeros((4, 4), bool)
    mask[:2] = True
    out = overlay(picture, weights, 1.0, mask, (3, 0))
    assert out.shape == (512, 512, 3) and overlay_scale(256) == 2
    block = out[128 + 64, 256 + 64].astype(int)
    assert block[0] > 200 > 150 > block[2]  # bright and warm
    assert out[64, 64].mean() > out[300, 300].mean()  # tokens outside the mask are darker
    assert (out[255, 10] == (120, 220, 255)).all() and not (out[128, 10] == (120, 220, 255)).all()
    assert (out[448 - 8 : 448 + 9, 64] == (80, 255, 120)).all(-1).any()
