"""The Look inside tab: click on a place of the picture, and see what it attends to."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr
from gradio.context import Context

from dit_accel.attn_spec import AttentionSpec

from .attention_maps import Caught
from .controls import DrawingControls, MechanismControls
from .engine import MOST_WAITING, Cancelled, Engine
from .inspection import Drawings, Drawn, Look, Step, Where, catch, draw, look
from .plots import NAMES, caught_figure, enlarged, map_figure
from .status import progress_line, status_line, waiting_line
from .work import Stops, message_for, stream

__all__ = ["build"]

_INTRODUCTION = (
    "The pipeline draws with dense attention, and its queries and keys are kept. Click on a place of the picture: you "
    "see which places it attends to under dense attention, and which it would under a mechanism."
)
_IDLE = "Press Draw, then click into the picture."
_READY = "Click on a place in one of the three pictures, or set it with the sliders below them."
_HELP = (
    "**Bright** places weigh much (both pictures have one scale; the ring is the place that looks). Under a mechanism, "
    "what is **outlined** is seen; heat outside the outline is pooled tokens, which stand for a patch each. The map "
    "shows which blocks of places each block has chosen. The bars: of all of dense attention's weight in a layer, how "
    "much lies on what the mechanism sees, mean over heads and places. Text is seen by every place. The weights are of "
    "the model as it is, not of converted ones; SLA's linear part adds nothing before it is trained, and is not shown."
)


def build(engine: Engine) -> None:
    """The tab's components and what they do."""
    gr.Markdown(_INTRODUCTION)
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            drawing = DrawingControls(engine)
            with gr.Row():
                run = gr.Button("Draw", variant="primary", elem_id="look-run")
                cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="look-cancel")
        with gr.Column(scale=1, min_width=320):
            with gr.Group(elem_id="look-mechanism"):
                mechanism = MechanismControls(engine, trained=False)
                mechanism.follow(drawing.kind)
            where = _WhereControls()
    view = _View(run, cancel, where)
    _wire(_Requests(engine, drawing, mechanism, view), where)


class _WhereControls:
    """Layer, step and head; the place is chosen below the pictures."""

    def __init__(self) -> None:
        self.layer = gr.Dropdown([], label="Layer", filterable=False, elem_id="look-layer")
        with gr.Row():
            self.step = gr.Radio([], label="Step", elem_id="look-step", min_width=180)
            self.head = gr.Slider(1, 2, 1, step=1, precision=0, label="Head", elem_id="look-head", min_width=180)

    def place(self) -> None:
        """The place's controls, where they are to stand."""
        options: dict[str, Any] = {"step": 1, "precision": 0, "min_width": 160}
        with gr.Row():
            self.x = gr.Slider(0, 511, 256, label="Place: pixels from the left", elem_id="look-x", **options)
            self.y = gr.Slider(0, 511, 256, label="Place: pixels from the top", elem_id="look-y", **options)
            self.shown = gr.Slider(
                1, 2, 1, label="Frame of tokens shown", elem_id="look-shown", visible=False, **options
            )
            self.frame = gr.Slider(1, 2, 1, label="Frame of the place", elem_id="look-frame", visible=False, **options)

    @property
    def inputs(self) -> list[Any]:
        return [self.layer, self.step, self.head, self.x, self.y, self.frame, self.shown]

    def for_drawing(self, drawn: Drawn) -> list[Any]:
        """Updates: what can be chosen of this drawing."""
        height, width = drawn.frames.shape[1:3]
        first = drawn.kept.steps[0]
        middle = drawn.layers[len(drawn.layers) // 2]
        heads, frames = drawn.call(first, middle).n_heads, drawn.token_frames
        steps = [(str(step + 1), step) for step in drawn.kept.steps]
        clip: dict[str, Any] = {"visible": frames > 1, "maximum": max(frames, 2), "value": (frames + 1) // 2}
        return [
            gr.Dropdown([(f"{i}: {name}", name) for i, name in enumerate(drawn.layers, 1)], value=middle),
            gr.Radio(steps, value=steps[len(steps) // 2][1], label=f"Step (of {drawn.wanted.steps})"),
            gr.Slider(maximum=max(heads, 2), value=1, visible=heads > 1),
            gr.Slider(maximum=width - 1, value=width // 2), gr.Slider(maximum=height - 1, value=height // 2),
            gr.Slider(**clip), gr.Slider(**clip),
        ]  # fmt: skip


class _View:
    """What is shown, as updates for ``outputs``."""

    def __init__(self, run: gr.Button, cancel: gr.Button, where: _WhereControls) -> None:
        self.where = where
        self.status = gr.HTML(status_line(_IDLE), elem_id="look-status")
        with gr.Column(visible=False, elem_id="look-results") as self.results:
            with gr.Row():
                self.pictures = [
                    gr.Image(
                        label=label, interactive=False, format="png", buttons=["fullscreen"], min_width=220,
                        elem_id=f"look-{name}",
                    )
                    for name, label in (("picture", "Picture: click on it"), ("dense", "Dense"), ("other", "Mechanism"))
                ]  # fmt: skip
            where.place()
            self.summary = gr.Markdown(elem_id="look-summary")
            with gr.Row():
                self.map = gr.Plot(show_label=False, visible=False, elem_id="look-map", scale=2, min_width=280)
                self.caught = gr.Plot(show_label=False, elem_id="look-caught", scale=3, min_width=320)
            gr.Markdown(_HELP)
        self.drawing_outputs: list[Any] = [
            run, cancel, self.status, self.results, self.pictures[0], *where.inputs,
        ]  # fmt: skip
        self.outputs: list[Any] = [self.status, *self.pictures, self.summary, self.map, self.caught]

    def drawing(self, *leading: Any, drawn: Drawn | None = None) -> list[Any]:
        """Updates of the drawing's outputs: the leading ones, and what can be chosen of a finished drawing."""
        rest = [gr.skip()] * len(self.where.inputs) if drawn is None else self.where.for_drawing(drawn)
        return [*leading, *[gr.skip()] * (5 - len(leading)), *rest]

    def begin(self) -> list[Any]:
        buttons = [gr.Button(interactive=False), gr.Button(interactive=True)]
        return self.drawing(*buttons, status_line("Starting …"), gr.Column(visible=False))

    def end(self, message: str, problem: bool = False, drawn: Drawn | None = None) -> list[Any]:
        buttons = [gr.Button(interactive=True), gr.Button(interactive=False)]
        leading = [*buttons, status_line(message, problem), gr.Column(visible=drawn is not None)]
        return self.drawing(*leading, drawn=drawn)

    def news(self, event: Step | int) -> list[Any]:
        if isinstance(event, int):
            return self.drawing(gr.skip(), gr.skip(), waiting_line(event))
        bar = progress_line(f"Drawing: step {event.step} of {event.steps}", event.step, event.steps, "Steps")
        if event.picture is None:
            return self.drawing(gr.skip(), gr.skip(), bar)
        return self.drawing(gr.skip(), gr.skip(), bar, gr.Column(visible=True), event.picture)

    def looked(self, found: Look, where: Where, steps: int) -> list[Any]:
        name = NAMES[found.processor.name]
        chosen: Any = gr.Plot(visible=False)
        if found.blocks is not None:
            figure = map_figure(found.processor.name, found.blocks.states.numpy(), found.row)
            chosen = gr.Plot(figure, visible=True)
        pictures = [found.picture, found.dense, gr.Image(found.other, label=name)]
        summary = _summary(found, where, steps)
        return [status_line("Looking through the layers …"), *pictures, summary, chosen, gr.skip()]

    def caught_in(self, name: str, shares: dict[str, Caught], layer: str) -> list[Any]:
        some = next(iter(shares.values()))
        title = (
            f"How much of dense attention {NAMES[name]} catches: mean of {some.places:,} of {some.all_places:,} places"
        )
        alone = name in ("clear", "gna")  # windows have no map beside it
        figure = caught_figure(name, title, list(shares), list(shares.values()), layer, wide=alone)
        return self._only(status_line(_READY), figure)

    def trouble(self, message: str) -> list[Any]:
        return self._only(status_line(message, problem=True), gr.skip())

    def waiting(self, before: int) -> list[Any]:
        return self._only(waiting_line(before), gr.skip())

    def nothing(self) -> list[Any]:
        """Gradio empties the outputs of a generator that yields nothing at all."""
        return [gr.skip()] * len(self.outputs)

    @staticmethod
    def _only(status: str, plot: Any) -> list[Any]:
        return [status, *[gr.skip()] * 5, plot]


class _Requests:
    """What the buttons, clicks and sliders do."""

    def __init__(
        self, engine: Engine, drawing: DrawingControls, mechanism: MechanismControls, view: _View
    ) -> None:  # fmt: skip
        self.engine, self.drawing, self.mechanism, self.view = engine, drawing, mechanism, view
        self.drawings = Drawings()
        self.draws, self.looks = Stops(), Stops()

    def draw(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        page = _page(request)
        self.looks.end(page)
        self.drawings.drop(page)
        stop = self.draws.begin(page)
        yield self.view.begin()
        try:
            _, wanted = self.drawing.read(*values)
            for event in stream(lambda tell: draw(self.engine, wanted, stop, tell), stop):
                if isinstance(event, Drawn):
                    self.drawings.put(page, event)
                    yield self.view.end(_READY, drawn=event)
                elif event is not None:
                    yield self.view.news(event)
        except Exception as error:
            yield self.view.end(message_for(error), not isinstance(error, Cancelled))

    def cancel(self, request: gr.Request) -> None:
        self.draws.end(_page(request))

    def look(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """The newest request of a page ends those before it."""
        page = _page(request)
        layer, step, head, x, y, frame, shown = values[:7]
        stop = self.looks.begin(page)
        try:
            drawn = self.drawings.get(page)
            where = Where(step, layer, int(head) - 1, int(x), int(y), int(frame) - 1, int(shown) - 1)
            spec = self.mechanism.student(drawn.wanted.kind, *values[7:])
            assert isinstance(spec, AttentionSpec)

            def work(tell: Any) -> None:
                with self.engine.turn(drawn.wanted.kind, stop, tell):
                    stop.check()
                    found = look(drawn, where, spec, self.engine.device)
                    tell(found)
                    tell(catch(drawn, step, found.processor, self.engine.device, stop))

            for event in stream(work, stop):
                if isinstance(event, Look):
                    yield self.view.looked(event, where, drawn.wanted.steps)
                elif event is not None:
                    caught_in = partial(self.view.caught_in, spec.name, layer=layer)
                    yield caught_in(event) if isinstance(event, dict) else self.view.waiting(event)
        except Cancelled:
            yield self.view.nothing()
        except Exception as error:
            yield self.view.trouble(message_for(error))

    def look_at_new(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """After a drawing: nothing if it was cancelled or failed, which was said."""
        try:
            self.drawings.get(_page(request))
        except ValueError:
            yield self.view.nothing()
            return
        yield from self.look(request, *values)

    def clicked(self, shown: int, request: gr.Request, event: gr.SelectData) -> list[Any]:
        """The place in pixels of the picture: those that are shown may be enlarged."""
        try:
            drawn = self.drawings.get(_page(request))
        except ValueError:
            return [gr.skip()] * 3
        height, width = drawn.frames.shape[1:3]
        x, y = (int(i) // enlarged(width) for i in event.index)
        return [min(max(x, 0), width - 1), min(max(y, 0), height - 1), shown]

    def forget(self, request: gr.Request) -> None:
        page = _page(request)
        self.draws.end(page)
        self.looks.end(page)
        self.drawings.drop(page)


def _wire(requests: _Requests, where: _WhereControls) -> None:
    view, drawing, mechanism = requests.view, requests.drawing, requests.mechanism
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    looking: dict[str, Any] = {
        "inputs": [*where.inputs, *mechanism.inputs], "outputs": view.outputs, "concurrency_id": "look",
        "concurrency_limit": MOST_WAITING + 2, "trigger_mode": "multiple", **quiet,
    }  # fmt: skip
    drawn = gr.on(
        [view.drawing_outputs[0].click, drawing.prompt.submit], requests.draw, drawing.inputs, view.drawing_outputs,
        concurrency_id="look-draw", concurrency_limit=MOST_WAITING + 2, **quiet,
    )  # fmt: skip
    drawn.then(requests.look_at_new, **looking)
    view.drawing_outputs[1].click(requests.cancel, None, None, queue=False, **quiet)
    for picture in view.pictures:
        place = picture.select(requests.clicked, where.shown, [where.x, where.y, where.frame], queue=False, **quiet)
        place.then(requests.look, **looking)
    gr.on([part.input for part in (*where.inputs, *mechanism.inputs)], requests.look, **looking)
    hide = partial(gr.Column, visible=False)
    drawing.kind.change(lambda: [hide(), status_line(_IDLE)], None, [view.results, view.status], queue=False, **quiet)
    assert Context.root_block is not None
    Context.root_block.unload(requests.forget)


def _page(request: gr.Request) -> str:
    return str(request.session_hash)


def _summary(found: Look, where: Where, steps: int) -> str:
    """The shares of one place, as a table."""
    one, name = found.attended, NAMES[found.processor.name]
    axes = ("frame", "row", "column")[-len(found.place) :]
    place = ", ".join(f"{axis} {i + 1} of {n}" for axis, i, n in zip(axes, found.place, found.layout.grid, strict=True))
    number, seen = found.layout.grid_len, int(one.seen.sum())
    rows = [
        ("", "Dense", name),
        (":--", "--:", "--:"),
        ("places that it sees itself", f"{number:,}", f"{seen:,} ({_percent(seen / number)})"),
        ("weight on text", _percent(one.dense_text), _percent(one.text)),
        *([("weight on pooled tokens", "–", _percent(one.pooled))] if one.pooled else []),
        ("**dense attention on what it sees**", "100 %", f"**{_percent(one.caught)}**"),
    ]
    title = f"**This place**: {place}; head {where.head + 1}, step {where.step + 1} of {steps}"
    return "\n".join([title, "", *(f"| {' | '.join(row)} |" for row in rows)])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
