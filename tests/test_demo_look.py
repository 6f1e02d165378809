"""Looking into a drawing: what is kept for whom, and what a place becomes on a layer's grid."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_accel.attn_spec import parse_attention
from dit_accel.compare.sizes import Size
from dit_accel.demo.ui import look_tab
from dit_accel.demo.ui.attention_maps import AttentionCall, Recording
from dit_accel.demo.ui.controls import Wanted
from dit_accel.demo.ui.engine import Cancelled, Engine, Stop
from dit_accel.demo.ui.inspection import Drawings, Drawn, Step, Where, catch, draw, look
from dit_accel.demo.ui.plots import enlarged, overlay
from dit_accel.errors import BadInput
from dit_accel.layout import TokenLayout

CPU = torch.device("cpu")


def a_drawn(*grids, frames=1, heads=2, side=64, before=3):
    """A layer for each grid."""
    calls = {}
    for i, grid in enumerate(grids):
        layout = TokenLayout(grid, before=before)
        generator = torch.Generator().manual_seed(i)
        query, key = (torch.randn(1, heads, layout.seq_len, 16, generator=generator) for _ in range(2))
        for step in (0, 3):
            calls[step, f"blocks.{i}"] = AttentionCall(query, key, layout, None, None)
    kept = Recording((0, 3), tuple(f"blocks.{i}" for i in range(len(grids))), 1 << 30, calls)
    picture = np.full((frames, side, side, 3), 200, np.uint8)
    kind = "image" if frames == 1 else "video"
    return Drawn(Wanted(kind, "a red circle", 0, Size(side, side), 4), picture, kept)


def see(drawn, text="clear:radius=2", **where):
    place = {"step": 0, "layer": "blocks.0", "head": 0, "x": 0, "y": 0} | where
    return look(drawn, Where(**place), parse_attention(text), CPU)


def test_a_pixel_is_a_token_of_the_layer_s_own_grid():
    drawn = a_drawn((8, 8), (4, 4))
    assert see(drawn, x=63, y=9).place == (1, 7)
    assert see(drawn, x=63, y=9, layer="blocks.1").place == (0, 3)
    assert see(drawn, x=999, y=-5).place == (0, 7)


def test_a_frame_of_a_clip_is_shown_and_the_ring_only_in_the_place_s_own():
    drawn = a_drawn((5, 4, 4), frames=9)
    drawn.frames[4] = 10
    there = see(drawn, text="gna:window=3x3x3", x=20, y=40, frame=2, shown=2)
    elsewhere = see(drawn, text="gna:window=3x3x3", x=20, y=40, frame=2, shown=0)
    assert there.place == elsewhere.place == (2, 2, 1)
    assert there.picture[0, 0, 0] == 10 and elsewhere.picture[0, 0, 0] == 200
    rings = [(look.picture == (80, 255, 120)).all(-1).any() for look in (there, elsewhere)]
    assert rings == [True, False]
    assert there.attended.seen.shape == (5, 4, 4) and there.attended.seen[0].sum() == 0


def test_overlay_of_another_frame_has_that_frame_s_weights():
    drawn = a_drawn((5, 4, 4), frames=9)
    pictures = [see(drawn, text="clear:radius=9", frame=2, shown=shown).dense for shown in range(5)]
    assert not any(np.array_equal(pictures[0], other) for other in pictures[1:])


def test_the_map_s_row_is_the_block_of_the_place():
    drawn = a_drawn((8, 8))
    found = see(drawn, text="sla:critical=0.3,block_q=16,block_kv=8", x=60, y=30)
    assert found.row == (3 * 8 + 7) // 16
    assert see(drawn).blocks is None


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("gna:window=9x9", {}, "larger than the grid"),
        ("clear:radius=2", {"head": 5}, "2 heads"),
        ("clear:radius=2", {"step": 1}, "not kept"),
        ("clear:radius=2", {"layer": "other"}, "not kept"),
    ],
)
def test_what_a_drawing_does_not_have_is_said(text, where, words):
    with pytest.raises(BadInput, match=words):
        see(a_drawn((8, 8)), text, **where)


def test_layers_are_looked_through_once_and_can_be_stopped():
    drawn = a_drawn((8, 8), (4, 4))
    processor = parse_attention("clear:radius=2").processor()
    found = catch(drawn, 3, processor, CPU, Stop())
    assert list(found) == ["blocks.0", "blocks.1"]
    stop = Stop()
    stop.set()
    with pytest.raises(Cancelled):
        catch(drawn, 0, processor, CPU, stop)
    kept = dict(found)
    assert all(catch(drawn, 3, processor, CPU, Stop())[layer] is kept[layer] for layer in kept)


def test_each_page_has_its_own_drawing():
    drawings, one, other = Drawings(), a_drawn((4, 4)), a_drawn((4, 4))
    drawings.put("a", one)
    drawings.put("b", other)
    assert drawings.get("a") is one and drawings.get("b") is other
    drawings.drop("a")
    drawings.drop("a")
    with pytest.raises(BadInput, match="press Draw"):
        drawings.get("a")
    assert drawings.get("b") is other


def test_the_drawing_that_was_not_looked_at_for_longest_goes_when_memory_is_short():
    each = a_drawn((4, 4)).n_bytes
    drawings = Drawings(most_bytes=int(2.5 * each))
    for page in "ab":
        drawings.put(page, a_drawn((4, 4)))
    drawings.get("a")
    drawings.put("c", a_drawn((4, 4)))
    drawings.get("a"), drawings.get("c")
    with pytest.raises(BadInput):
        drawings.get("b")
    drawings = Drawings(most_bytes=1)
    drawings.put("a", a_drawn((4, 4)))
    assert drawings.get("a").frames.any()  # one that is too large by itself stays for its page


@pytest.fixture(scope="module")
def engine():
    with Engine(None, CPU, torch.float32) as engine:
        yield engine


def small(engine, steps=2):
    return Wanted("image", engine.about("image").prompts[0], 0, Size(64, 64), steps)


def test_a_drawing_is_that_of_the_pipeline_with_news_on_the_way(engine):
    told = []
    draw(engine, small(engine), Stop(), told.append)
    *news, drawn = told
    assert [event.step for event in news if isinstance(event, Step)] == [1, 2]
    with engine.turn("image") as loaded:
        wanted = small(engine)
        plain = engine.draw(loaded, wanted.prompt, wanted.seed, wanted.size, wanted.steps, Stop())
    assert np.array_equal(drawn.frames, plain.frames)
    assert len(drawn.layers) == 9 and drawn.kept.steps == (0, 1)
    found = look(drawn, Where(1, drawn.layers[0], 1, 20, 20), parse_attention("llsa"), CPU)
    assert found.layout.grid == (8, 8) and found.dense.shape == (512, 512, 3)


def test_a_drawing_that_is_stopped_keeps_nothing(engine):
    stop = Stop()
    told = []

    def tell(event):
        told.append(event)
        stop.set()

    with pytest.raises(Cancelled):
        draw(engine, small(engine, steps=5), stop, tell)
    assert not any(isinstance(event, Drawn) for event in told) and len(told) < 3


def test_a_page_that_is_closed_is_forgotten(engine):
    import gradio as gr

    with gr.Blocks() as blocks:
        look_tab.build(engine)
    (forget,) = [one.fn for one in blocks.fns.values() if any(event == "unload" for _, event in one.targets)]
    drawings = forget.__self__.drawings
    drawings.put("page", a_drawn((4, 4)))
    forget(SimpleNamespace(session_hash="other"))
    assert drawings.get("page")
    forget(SimpleNamespace(session_hash="page"))
    with pytest.raises(BadInput):
        drawings.get("page")


def test_overlay_shows_weights_what_is_seen_and_the_place():
    picture = np.full((256, 256, 3), 100, np.uint8)
    weights = np.zeros((4, 4), np.float32)
    weights[1, 2] = 1
    seen = np.zeros((4, 4), bool)
    seen[:2] = True
    out = overlay(picture, weights, 1.0, seen, (3, 0))
    assert out.shape == (512, 512, 3) and enlarged(256) == 2
    block = out[128 + 64, 256 + 64].astype(int)
    assert block[0] > 200 > 150 > block[2]  # bright and warm
    assert out[64, 64].mean() > out[300, 300].mean()  # what is not seen is darker
    assert (out[255, 10] == (120, 220, 255)).all() and not (out[128, 10] == (120, 220, 255)).all()
    assert (out[448 - 8 : 448 + 9, 64] == (80, 255, 120)).all(-1).any()
