"""Speed tab: live benchmark of one attention call against the number of tokens."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from dit_accel.mechanisms.registry import untrained_mechanisms

from .engine import MAX_WAITING, Cancelled, Engine, Stop
from .plots import label_of
from .speed import DENSE, Plan, Speed, check_plan, measure
from .status import progress_line, status_line, waiting_line
from .work import Stops, message_for, stream

__all__ = ["build"]

_INTRODUCTION = (
    "Time of one attention call on this machine against the number of tokens: dense attention and each mechanism, on "
    "the same random tensors, the smallest size first."
)
_IDLE = "Press Measure. Requests of other pages wait until the measurement ends, so that they do not disturb the times."
_CPU_NOTE = (
    "On the CPU, the mechanisms run in plain PyTorch and gather their blocks before the matrix products. This is "
    "faster than dense attention only above some size. On a GPU, they are Triton kernels."
)
_HOW = (
    "Each time is the median of several calls after a warm-up; the shaded band spans the lower to the upper quartile. "
    "Times include block selection, pooling and SLA's linear branch. A star marks the break-even with dense attention: "
    "from there on, the mechanism is faster at each measured size. A curve ends if its next size would exceed the time "
    "limit."
)
_MAX_DISPLAY_SECONDS = 10.0  # maximum wait for the page to show a point before the next measurement


def build(engine: Engine) -> None:
    """Build the components of the tab and their event handlers."""
    gr.Markdown(_INTRODUCTION)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            inputs = _inputs()
            with gr.Row():
                run = gr.Button("Measure", variant="primary", elem_id="speed-run")
                cancel = gr.Button("Stop", variant="stop", interactive=False, elem_id="speed-cancel")
        with gr.Column(scale=3, min_width=320):
            view = _View(run, cancel)
            if engine.device.type == "cpu":
                gr.Markdown(_CPU_NOTE)
    requests = _Requests(engine, view)
    run.click(
        requests.run, inputs, view.outputs, concurrency_id="speed", concurrency_limit=MAX_WAITING + 2,
        show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    cancel.click(requests.cancel, None, None, queue=False, show_progress="hidden", api_visibility="private")


def _inputs() -> list[Any]:
    names = untrained_mechanisms()
    return [
        gr.Radio(
            [("Image (H, W)", "image"), ("Video (T, H, W)", "video")], value="image", label="Token grid",
            elem_id="speed-kind",
        ),
        gr.CheckboxGroup([(label_of(name), name) for name in names], value=names, label="Mechanisms"),
        gr.Slider(
            0.02, 0.5, 0.1, step=0.01, label="Share of the logits",
            info="Approximate share of dense attention's logits. LLSA keeps 8 blocks of 16 tokens per level instead.",
        ),
        gr.Slider(1, 24, 2, step=1, precision=0, label="Heads"),
        gr.Dropdown([32, 64, 128], value=64, label="Head dimension", filterable=False),
        gr.Slider(5, 600, 60, step=5, precision=0, label="Time limit (seconds)", elem_id="speed-seconds"),
    ]  # fmt: skip


class _View:
    """Outputs of the tab. Methods return updates for ``outputs``."""

    def __init__(self, run: gr.Button, cancel: gr.Button) -> None:
        self.status = gr.HTML(status_line(_IDLE), elem_id="speed-status")
        self.plot = gr.Plot(show_label=False, elem_id="speed-plot")
        self.sentences = gr.Markdown(elem_id="speed-sentences")
        with gr.Row():
            self.picture = gr.DownloadButton("Download PNG", visible=False, elem_id="speed-png")
            self.data = gr.DownloadButton("Download JSON", visible=False, elem_id="speed-json")
        with gr.Accordion("Times in milliseconds", open=False):
            self.table = gr.Markdown(elem_id="speed-table")
        with gr.Accordion("How this is measured", open=False):
            gr.Markdown(_HOW)
        self.outputs: list[Any] = [
            run, cancel, self.status, self.plot, self.sentences, self.table, self.picture, self.data,
        ]  # fmt: skip

    def begin(self) -> list[Any]:
        hidden = [gr.DownloadButton(visible=False)] * 2
        buttons = [gr.Button(interactive=False), gr.Button(interactive=True)]
        return [*buttons, status_line("Starting …"), gr.skip(), "", "", *hidden]

    def waiting(self, before: int) -> list[Any]:
        return self._changed(status=waiting_line(before))

    def show_row(self, speed: Speed, spent: float) -> list[Any]:
        row = speed.rows[-1]
        done = f"{label_of(row['attention'])} at {row['tokens']:,} tokens"
        bar = progress_line(f"Measured: {done}", spent, speed.plan.seconds, "Time limit")
        return self._changed(status=bar, plot=speed.figure(), sentences=_bullets(speed), table=_table(speed))

    def end(self, message: str, problem: bool = False) -> list[Any]:
        return self._changed(is_finished=True, status=status_line(message, problem))

    def show_result(self, speed: Speed, message: str, picture: Path, data: Path) -> list[Any]:
        return self._changed(
            is_finished=True, status=status_line(message), plot=speed.figure(), sentences=_bullets(speed),
            table=_table(speed), picture=gr.DownloadButton(value=str(picture), visible=True),
            data=gr.DownloadButton(value=str(data), visible=True),
        )  # fmt: skip

    def _changed(self, is_finished: bool = False, **changed: Any) -> list[Any]:
        buttons = [gr.Button(interactive=True), gr.Button(interactive=False)] if is_finished else [gr.skip(), gr.skip()]
        names = ("status", "plot", "sentences", "table", "picture", "data")
        return [*buttons, *(changed.get(name, gr.skip()) for name in names)]


class _Requests:
    """Event handlers of the buttons."""

    def __init__(self, engine: Engine, view: _View) -> None:
        self.engine, self.view = engine, view
        self.stops = Stops()

    def run(
        self, kind: str, mechanisms: list[str], share: float, heads: int, head_dim: int, seconds: float,
        request: gr.Request,
    ) -> Iterator[list[Any]]:  # fmt: skip
        stop = self.stops.begin(str(request.session_hash))
        yield self.view.begin()
        speed = Speed(
            Plan(kind, heads, head_dim, share, seconds, tuple(mechanisms)), self.engine.device, self.engine.dtype
        )
        try:
            check_plan(speed.plan)
            yield from self._measure(speed, stop)
            speed.status, message = "complete", "Done."
        except Cancelled as error:
            speed.status, message = "cancelled", message_for(error)
        except Exception as error:
            yield self.view.end(message_for(error), problem=True)
            return
        if not speed.rows:
            yield self.view.end(message)
            return
        with tempfile.TemporaryDirectory(dir=self.engine.folder) as folder:  # Gradio copies the files
            yield self.view.show_result(speed, message, *speed.save(Path(folder)))

    def _measure(self, speed: Speed, stop: Stop) -> Iterator[list[Any]]:
        """Yield an update after each measurement. The next one starts after the page has drawn it."""
        shown = threading.Event()

        def work(report: Callable[[Any], None]) -> None:
            with self.engine.turn(self.engine.kinds[0], stop, report):
                began = time.monotonic()
                for row in measure(speed.plan, speed.device, speed.dtype, stop):
                    speed.rows.append(row)
                    report(time.monotonic() - began)
                    _wait(shown, stop)

        for event in stream(work, stop):
            if event is None:
                continue
            yield self.view.waiting(event) if isinstance(event, int) else self.view.show_row(speed, event)
            shown.set()

    def cancel(self, request: gr.Request) -> None:
        self.stops.end(str(request.session_hash))


def _wait(shown: threading.Event, stop: Stop) -> None:
    end = time.monotonic() + _MAX_DISPLAY_SECONDS
    while not shown.wait(0.05) and time.monotonic() < end:
        stop.check()
    shown.clear()


def _bullets(speed: Speed) -> str:
    return "\n".join(f"- {sentence}" for sentence in speed.sentences())


def _table(speed: Speed) -> str:
    """Table of milliseconds by tokens and attention, with the share of the logits."""
    names = [DENSE, *speed.plan.mechanisms]
    head = ["tokens", *(label_of(name) for name in names)]
    cells = {(row["tokens"], row["attention"]): _cell(row) for row in speed.rows}
    lines = [head, ["--:"] * len(head)]
    for tokens in sorted({tokens for tokens, _ in cells}):
        lines.append([f"{tokens:,}", *(cells.get((tokens, name), "–") for name in names)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: dict[str, Any]) -> str:
    if row["status"] == "failed":
        return str(row["error"])
    share = "" if row["attention"] == DENSE else f" ({100 * row['logit_fraction']:.0f} %)"
    return f"{row['ms']:.3g}{share}"
