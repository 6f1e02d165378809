"""Look inside tab: click on a place in the picture to see which tokens it attends to."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr
from gradio.context import Context

from dit_accel.mechanisms.attn_spec import AttentionSpec
from dit_accel.mechanisms.processor import AcceleratedAttnProcessor
from dit_accel.mechanisms.registry import PROCESSORS

from .attention_maps import Coverage
from .controls import DrawingControls, MechanismControls
from .engine import MAX_WAITING, Cancelled, Engine
from .inspection import Drawings, Drawn, Inspection, Position, Step, coverage_by_layer, draw, inspect_token
from .plots import coverage_figure, label_of, map_figure, overlay_scale
from .status import progress_line, status_line, waiting_line
from .work import Stops, message_for, stream

__all__ = ["build"]

_INTRODUCTION = (
    "The pipeline draws with dense attention, and its queries and keys are recorded. Click on a place in the picture "
    "to see which tokens it attends to under dense attention and under a mechanism."
)
_IDLE = "Press Draw, then click on the picture."
_READY = "Click on a place in one of the three pictures, or set it with the sliders below them."
_HELP = (
    "**Bright** tokens have a large weight (both pictures have the same scale). The ring marks the query token. Under "
    "a mechanism, the **outlined** tokens are attended to; weight outside the outline is on pooled tokens, each of "
    "which is the mean of a tile. The map shows the key blocks that each query block selected. The bars show the share "
    "of dense attention's weight that lies on the attended tokens, mean over heads and query tokens. Every token "
    "attends to all text tokens. The weights are the pipeline's own, not converted ones; SLA's linear part contributes "
    "nothing before it is trained, and is not shown."
)


def build(engine: Engine) -> None:
    """Build the components of the tab and their event handlers."""
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
            position = _PositionControls()
    view = _View(run, cancel, position)
    _wire(_Requests(engine, drawing, mechanism, view), position)


class _PositionControls:
    """Controls for layer, step and head; those of the place are below the pictures."""

    def __init__(self) -> None:
        self.layer = gr.Dropdown([], label="Layer", filterable=False, elem_id="look-layer")
        with gr.Row():
            self.step = gr.Radio([], label="Step", elem_id="look-step", min_width=180)
            self.head = gr.Slider(1, 2, 1, step=1, precision=0, label="Head", elem_id="look-head", min_width=180)

    def place(self) -> None:
        """Create the controls of the place in the current layout."""
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
        """Updates that offer the layers, steps, heads and frames of this drawing."""
        height, width = drawn.frames.shape[1:3]
        first = drawn.recording.steps[0]
        middle = drawn.layers[len(drawn.layers) // 2]
        heads, frames = drawn.call(first, middle).n_heads, drawn.token_frames
        steps = [(str(step + 1), step) for step in drawn.recording.steps]
        clip: dict[str, Any] = {"visible": frames > 1, "maximum": max(frames, 2), "value": (frames + 1) // 2}
        return [
            gr.Dropdown([(f"{i}: {name}", name) for i, name in enumerate(drawn.layers, 1)], value=middle),
            gr.Radio(steps, value=steps[len(steps) // 2][1], label=f"Step (of {drawn.wanted.steps})"),
            gr.Slider(maximum=max(heads, 2), value=1, visible=heads > 1),
            gr.Slider(maximum=width - 1, value=width // 2), gr.Slider(maximum=height - 1, value=height // 2),
            gr.Slider(**clip), gr.Slider(**clip),
        ]  # fmt: skip


class _View:
    """Outputs of the tab. Methods return updates for ``outputs`` or ``drawing_outputs``."""

    def __init__(self, run: gr.Button, cancel: gr.Button, position: _PositionControls) -> None:
        self.position = position
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
            position.place()
            self.summary = gr.Markdown(elem_id="look-summary")
            with gr.Row():
                self.map = gr.Plot(show_label=False, visible=False, elem_id="look-map", scale=2, min_width=280)
                self.coverage = gr.Plot(show_label=False, elem_id="look-coverage", scale=3, min_width=320)
            gr.Markdown(_HELP)
        self.drawing_outputs: list[Any] = [
            run, cancel, self.status, self.results, self.pictures[0], *position.inputs,
        ]  # fmt: skip
        self.outputs: list[Any] = [self.status, *self.pictures, self.summary, self.map, self.coverage]

    def drawing(self, *leading: Any, drawn: Drawn | None = None) -> list[Any]:
        """Updates of ``drawing_outputs``: the leading ones, and the position controls of a finished drawing."""
        rest = [gr.skip()] * len(self.position.inputs) if drawn is None else self.position.for_drawing(drawn)
        return [*leading, *[gr.skip()] * (5 - len(leading)), *rest]

    def begin(self) -> list[Any]:
        buttons = [gr.Button(interactive=False), gr.Button(interactive=True)]
        return self.drawing(*buttons, status_line("Starting …"), gr.Column(visible=False))

    def end(self, message: str, problem: bool = False, drawn: Drawn | None = None) -> list[Any]:
        buttons = [gr.Button(interactive=True), gr.Button(interactive=False)]
        leading = [*buttons, status_line(message, problem), gr.Column(visible=drawn is not None)]
        return self.drawing(*leading, drawn=drawn)

    def show_step(self, event: Step | int) -> list[Any]:
        if isinstance(event, int):
            return self.drawing(gr.skip(), gr.skip(), waiting_line(event))
        bar = progress_line(f"Drawing: step {event.step} of {event.steps}", event.step, event.steps, "Steps")
        if event.picture is None:
            return self.drawing(gr.skip(), gr.skip(), bar)
        return self.drawing(gr.skip(), gr.skip(), bar, gr.Column(visible=True), event.picture)

    def inspected(self, found: Inspection, position: Position, steps: int) -> list[Any]:
        name = label_of(found.processor.name)
        chosen: Any = gr.Plot(visible=False)
        if found.blocks is not None:
            figure = map_figure(found.blocks.states.numpy(), found.row)
            chosen = gr.Plot(figure, visible=True)
        pictures = [found.picture, found.dense, gr.Image(found.other, label=name)]
        summary = _summary(found, position, steps)
        return [status_line("Computing the coverage of each layer …"), *pictures, summary, chosen, gr.skip()]

    def show_coverage(self, name: str, shares: dict[str, Coverage], layer: str) -> list[Any]:
        coverage = next(iter(shares.values()))
        title = (
            f"Share of dense attention covered by {label_of(name)}: mean of {coverage.n_queries:,} of "
            f"{coverage.n_grid_tokens:,} tokens"
        )
        has_map = PROCESSORS[name].block_tables is not AcceleratedAttnProcessor.block_tables  # beside it
        figure = coverage_figure(name, title, list(shares), list(shares.values()), layer, wide=not has_map)
        return self._only(status_line(_READY), figure)

    def show_problem(self, message: str) -> list[Any]:
        return self._only(status_line(message, problem=True), gr.skip())

    def waiting(self, before: int) -> list[Any]:
        return self._only(waiting_line(before), gr.skip())

    def no_change(self) -> list[Any]:
        """No changes. Needed because Gradio clears the outputs of a generator that yields nothing."""
        return [gr.skip()] * len(self.outputs)

    @staticmethod
    def _only(status: str, plot: Any) -> list[Any]:
        return [status, *[gr.skip()] * 5, plot]


class _Requests:
    """Event handlers of buttons, clicks and sliders."""

    def __init__(
        self, engine: Engine, drawing: DrawingControls, mechanism: MechanismControls, view: _View
    ) -> None:  # fmt: skip
        self.engine, self.drawing, self.mechanism, self.view = engine, drawing, mechanism, view
        self.drawings = Drawings()
        self.draws, self.inspections = Stops(), Stops()

    def draw(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        page = _page(request)
        self.inspections.end(page)
        self.drawings.drop(page)
        stop = self.draws.begin(page)
        yield self.view.begin()
        try:
            _, wanted = self.drawing.read(*values)
            for event in stream(lambda report: draw(self.engine, wanted, stop, report), stop):
                if isinstance(event, Drawn):
                    self.drawings.put(page, event)
                    yield self.view.end(_READY, drawn=event)
                elif event is not None:
                    yield self.view.show_step(event)
        except Exception as error:
            yield self.view.end(message_for(error), not isinstance(error, Cancelled))

    def cancel(self, request: gr.Request) -> None:
        self.draws.end(_page(request))

    def inspect_token(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Inspect a token; a new request of a page cancels the previous one."""
        page = _page(request)
        layer, step, head, x, y, frame, shown = values[:7]
        stop = self.inspections.begin(page)
        try:
            drawn = self.drawings.get(page)
            position = Position(step, layer, int(head) - 1, int(x), int(y), int(frame) - 1, int(shown) - 1)
            spec = self.mechanism.student(drawn.wanted.kind, *values[7:])
            assert isinstance(spec, AttentionSpec)

            def work(report: Any) -> None:
                with self.engine.turn(drawn.wanted.kind, stop, report):
                    stop.check()
                    found = inspect_token(drawn, position, spec, self.engine.device)
                    report(found)
                    report(coverage_by_layer(drawn, step, found.processor, self.engine.device, stop))

            for event in stream(work, stop):
                if isinstance(event, Inspection):
                    yield self.view.inspected(event, position, drawn.wanted.steps)
                elif event is not None:
                    show_coverage = partial(self.view.show_coverage, spec.name, layer=layer)
                    yield show_coverage(event) if isinstance(event, dict) else self.view.waiting(event)
        except Cancelled:
            yield self.view.no_change()
        except Exception as error:
            yield self.view.show_problem(message_for(error))

    def inspect_new(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Inspect a new drawing; no change if it was cancelled or failed, which the status already says."""
        try:
            self.drawings.get(_page(request))
        except ValueError:
            yield self.view.no_change()
            return
        yield from self.inspect_token(request, *values)

    def clicked(self, shown: int, request: gr.Request, event: gr.SelectData) -> list[Any]:
        """Position of a click in pixels of the picture, which may be shown enlarged."""
        try:
            drawn = self.drawings.get(_page(request))
        except ValueError:
            return [gr.skip()] * 3
        height, width = drawn.frames.shape[1:3]
        x, y = (int(i) // overlay_scale(width) for i in event.index)
        return [min(max(x, 0), width - 1), min(max(y, 0), height - 1), shown]

    def unload(self, request: gr.Request) -> None:
        page = _page(request)
        self.draws.end(page)
        self.inspections.end(page)
        self.drawings.drop(page)


def _wire(requests: _Requests, position: _PositionControls) -> None:
    view, drawing, mechanism = requests.view, requests.drawing, requests.mechanism
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    looking: dict[str, Any] = {
        "inputs": [*position.inputs, *mechanism.inputs], "outputs": view.outputs, "concurrency_id": "look",
        "concurrency_limit": MAX_WAITING + 2, "trigger_mode": "multiple", **quiet,
    }  # fmt: skip
    drawn = gr.on(
        [view.drawing_outputs[0].click, drawing.prompt.submit], requests.draw, drawing.inputs, view.drawing_outputs,
        concurrency_id="look-draw", concurrency_limit=MAX_WAITING + 2, **quiet,
    )  # fmt: skip
    drawn.then(requests.inspect_new, **looking)
    view.drawing_outputs[1].click(requests.cancel, None, None, queue=False, **quiet)
    for picture in view.pictures:
        place = picture.select(
            requests.clicked, position.shown, [position.x, position.y, position.frame], queue=False, **quiet
        )
        place.then(requests.inspect_token, **looking)
    gr.on([part.input for part in (*position.inputs, *mechanism.inputs)], requests.inspect_token, **looking)
    hide = partial(gr.Column, visible=False)
    drawing.kind.change(lambda: [hide(), status_line(_IDLE)], None, [view.results, view.status], queue=False, **quiet)
    assert Context.root_block is not None
    Context.root_block.unload(requests.unload)


def _page(request: gr.Request) -> str:
    return str(request.session_hash)


def _summary(found: Inspection, position: Position, steps: int) -> str:
    """Table of the shares of one query token."""
    one, name = found.attended, label_of(found.processor.name)
    axes = ("frame", "row", "column")[-len(found.place) :]
    place = ", ".join(f"{axis} {i + 1} of {n}" for axis, i, n in zip(axes, found.place, found.layout.grid, strict=True))
    n_tokens, n_attended = found.layout.grid_len, int(one.mask.sum())
    rows = [
        ("", "Dense", name),
        (":--", "--:", "--:"),
        ("tokens attended to", f"{n_tokens:,}", f"{n_attended:,} ({_percent(n_attended / n_tokens)})"),
        ("weight on text", _percent(one.dense_global), _percent(one.on_global)),
        *([("weight on pooled tokens", "–", _percent(one.pooled))] if one.pooled else []),
        ("**dense attention covered**", "100 %", f"**{_percent(one.coverage)}**"),
    ]
    title = f"**This place**: {place}; head {position.head + 1}, step {position.step + 1} of {steps}"
    return "\n".join([title, "", *(f"| {' | '.join(row)} |" for row in rows)])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
