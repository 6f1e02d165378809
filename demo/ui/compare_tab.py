"""Compare tab: the same prompt and seed drawn with dense attention and with another one, under one slider."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dit_accel.comparison.sheet import save_clip
from dit_accel.comparison.students import Student

from .comparison import Comparison, Progress, compare_attention, python_lines
from .controls import DrawingControls, MechanismControls
from .engine import MAX_WAITING, Cancelled, Engine, Loaded
from .status import duration, progress_line, status_line, waiting_line
from .work import Stops, Waiting, message_for, stream

__all__ = ["CSS", "HEAD", "build"]

_FPS = 16
_IDLE = (
    "Press <b>Draw both</b>: the prompt is drawn with dense attention, then with the selected one, from the same seed."
)
_HELP = (
    "*seconds per step*: median time in the denoiser. *logits computed*: share of query-key products that are computed "
    "exactly. *PSNR*, *SSIM*: similarity to the dense picture; above 30 dB, or near 1, differences are hard to see."
)
_UNTRAINED = (
    "This attention was installed without training. Fine-tuned weights bring the picture closer to the dense one: "
    "select them in the list if there are any, or train them under *Convert*."
)

CSS = """
.at-the-bottom { align-self: end }
.gradio-container input[role=combobox] { text-overflow: ellipsis; padding-right: 1.5rem }  /* on narrow screens */
#compare-code .cm-gutters { display: none }  /* empty, but keeps the height that it had before the code was shown */
#compare-figures table { width: 100%; border-collapse: collapse }
#compare-figures :is(table, thead, tbody, tr) { border: 0 !important }
#compare-figures :is(th, td) { border: 0; border-bottom: 1px solid var(--border-color-primary); padding: 0.4rem 0.5rem }
#compare-figures :is(th, td):not(:first-child) { text-align: right; font-variant-numeric: tabular-nums }
"""

_MOVE_BORDER = "(percent) => ({ __type__: 'update', slider_position: percent })"  # in the browser, at once

# Keeps the two clips in step (play, pause, seek, rate). Gradio has no option for it.
HEAD = """<script>
(() => {
  const clips = () => [...document.querySelectorAll("#compare-clips video")];
  const led = new WeakSet();  // clips that this script has just moved
  const follow = (name, act) => document.addEventListener(name, (event) => {
    const all = clips();
    if (!all.includes(event.target)) return;
    all.filter((clip) => clip !== event.target).forEach((clip) => act(clip, event.target));
  }, true);
  const together = (clip, leader, apart) => {
    if (Math.abs(clip.currentTime - leader.currentTime) <= apart) return;
    led.add(clip);
    clip.currentTime = leader.currentTime;
  };
  follow("play", (clip, leader) => { together(clip, leader, 0.05); clip.play().catch(() => {}); });
  follow("pause", (clip, leader) => { clip.pause(); together(clip, leader, 0.001); });
  follow("seeking", (clip, leader) => { led.delete(leader) || together(clip, leader, leader.paused ? 0.001 : 0.05); });
  follow("timeupdate", (clip, leader) => { leader.paused || leader !== clips()[0] || together(clip, leader, 0.05); });
  follow("ratechange", (clip, leader) => { clip.playbackRate = leader.playbackRate; });
})();
</script>"""


def build(engine: Engine) -> None:
    """Build the components of the tab and their event handlers."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            drawing = DrawingControls(engine)
            mechanism = MechanismControls(engine)
            mechanism.follow(drawing.kind)
            with gr.Row():
                run = gr.Button("Draw both", variant="primary", elem_id="compare-run")
                cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="compare-cancel")
        with gr.Column(scale=3, min_width=320):
            view = _View(engine, run, cancel)
    requests = _Requests(engine, drawing, mechanism, view)
    gr.on(
        [run.click, drawing.prompt.submit], requests.run, [*drawing.inputs, *mechanism.inputs], view.outputs,
        concurrency_id="compare", concurrency_limit=MAX_WAITING + 2, show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    cancel.click(requests.cancel, None, None, queue=False, show_progress="hidden", api_visibility="private")
    drawing.kind.change(
        view.for_kind, drawing.kind, [view.slider, view.border, view.clips], queue=False, show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip


class _View:
    """Right side of the tab. Methods return updates for ``outputs``."""

    def __init__(self, engine: Engine, run: gr.Button, cancel: gr.Button) -> None:
        self.engine = engine
        clip = engine.kinds[0] == "video"
        self.status = gr.HTML(status_line(_IDLE), elem_id="compare-status")
        self.slider = gr.ImageSlider(
            label="Dense | the other attention", interactive=False, format="png", max_height=640,
            visible=not clip, elem_id="compare-slider", buttons=["fullscreen"],
        )  # fmt: skip
        self.border = gr.Slider(
            0, 100, 50, step=1, precision=0, label="Border between the two", info="Or drag it in the picture.",
            visible=False, buttons=[],
        )  # fmt: skip
        self.border.input(None, self.border, self.slider, js=_MOVE_BORDER, api_visibility="private")
        self.preview = gr.Image(
            label="Preview: middle of the clip", interactive=False, visible=False, height=320,
            elem_id="compare-preview", buttons=[],
        )  # fmt: skip
        with gr.Row(visible=clip, elem_id="compare-clips") as self.clips:
            options: dict[str, Any] = {"autoplay": True, "loop": True, "interactive": False, "min_width": 150}
            self.dense = gr.Video(label="Dense", buttons=["download"], elem_id="compare-dense", **options)
            self.other = gr.Video(label="The other attention", buttons=["download"], elem_id="compare-other", **options)
        self.figures = gr.Markdown(elem_id="compare-figures")
        self.code = gr.Code(
            language="python", label="The same in Python", interactive=False, visible=False, wrap_lines=True,
            show_line_numbers=False, lines=1,
            elem_id="compare-code",
        )  # fmt: skip
        self.outputs: list[Any] = [
            run, cancel, self.status, self.slider, self.border, self.preview, self.dense, self.other, self.figures,
            self.code,
        ]  # fmt: skip

    def for_kind(self, kind: str) -> list[Any]:
        return [gr.ImageSlider(visible=kind == "image"), gr.Slider(visible=False), gr.Row(visible=kind == "video")]

    def begin(self) -> list[Any]:
        return self._update(
            gr.Button(interactive=False), gr.Button(interactive=True), status=status_line("Starting …"), figures="",
            code=gr.Code(visible=False),
        )  # fmt: skip

    def end(self, message: str, problem: bool) -> list[Any]:
        return self._update(
            gr.Button(interactive=True), gr.Button(interactive=False), preview=gr.Image(visible=False),
            status=status_line(message, problem),
        )  # fmt: skip

    def show_progress(self, kind: str, name: str, event: Waiting | Progress) -> list[Any]:
        if isinstance(event, Waiting):
            return self._update(status=waiting_line(event.before))
        update: dict[str, Any] = {"status": _progress_bar(name, event)}
        if event.pictures is not None and kind == "image":
            update["slider"] = gr.ImageSlider(value=_pair(*event.pictures), label=f"Dense | {name}")
        elif event.pictures is not None:
            update["preview"] = gr.Image(
                event.pictures[event.drawing], visible=event.pictures[event.drawing] is not None
            )
        return self._update(**update)

    def show_result(self, comparison: Comparison, loaded: Loaded, folder: Path) -> list[Any]:
        name = _name(comparison.student)
        update: dict[str, Any] = {
            "status": status_line("Done."), "figures": _figures(comparison, name), "preview": gr.Image(visible=False),
            "code": gr.Code(python_lines(comparison, loaded), visible=True),
        }  # fmt: skip
        if comparison.wanted.kind == "image":
            pair = _pair(comparison.dense.frames[0], comparison.other.frames[0])
            update["slider"] = gr.ImageSlider(value=pair, label=f"Dense | {name}")
        else:
            for key, drawn in (("dense", comparison.dense), ("other", comparison.other)):
                save_clip(folder / f"{key}.mp4", iter(drawn.frames), _FPS)
                update[key] = gr.Video(str(folder / f"{key}.mp4"), label="Dense" if key == "dense" else name)
        return self._update(gr.Button(interactive=True), gr.Button(interactive=False), **update)

    def _update(self, run: Any = None, cancel: Any = None, **changed: Any) -> list[Any]:
        if "slider" in changed:
            changed["border"] = gr.Slider(visible=True)
        names = ("status", "slider", "border", "preview", "dense", "other", "figures", "code")
        return [run or gr.skip(), cancel or gr.skip(), *(changed.get(name, gr.skip()) for name in names)]


class _Requests:
    """Event handlers of the buttons."""

    def __init__(self, engine: Engine, drawing: DrawingControls, mechanism: MechanismControls, view: _View) -> None:
        self.engine, self.drawing, self.mechanism, self.view = engine, drawing, mechanism, view
        self.stops = Stops()

    def run(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        stop = self.stops.begin(_page(request))
        yield self.view.begin()
        try:
            count = len(self.drawing.inputs)
            loaded, wanted = self.drawing.read(*values[:count])
            spec = self.mechanism.student(wanted.kind, *values[count:])
            name = str(values[count]) if isinstance(spec, str) else spec.name.upper()
            for event in stream(lambda report: compare_attention(self.engine, wanted, spec, stop, report), stop):
                if isinstance(event, Comparison):
                    with tempfile.TemporaryDirectory(dir=self.engine.folder) as folder:
                        yield self.view.show_result(event, loaded, Path(folder))
                else:
                    yield (
                        self.view.show_progress(wanted.kind, name, event) if event is not None else self.view._update()
                    )
        except Exception as error:
            yield self.view.end(message_for(error), not isinstance(error, Cancelled))

    def cancel(self, request: gr.Request) -> None:
        self.stops.end(_page(request))


def _page(request: gr.Request) -> str:
    return str(request.session_hash)


def _name(student: Student) -> str:
    return student.processor.name.upper() + (", trained" if student.source is not None else "")


def _pair(left: NDArray[np.uint8] | None, right: NDArray[np.uint8] | None) -> tuple[Image.Image, Image.Image]:
    """Both pictures in the same size; a missing one is replaced by the other."""
    some = left if left is not None else right
    assert some is not None
    pictures = [Image.fromarray(some if one is None else one) for one in (left, right)]
    size = max(picture.size for picture in pictures)
    first, second = (picture if picture.size == size else picture.resize(size) for picture in pictures)
    return first, second


def _progress_bar(name: str, event: Progress) -> str:
    what = ("dense attention", name)[event.drawing]
    left = "" if event.seconds_left is None else f" · about {duration(event.seconds_left)} left"
    done, total = event.drawing * event.steps + event.step, 2 * event.steps
    text = f"Drawing with {what}: step {event.step} of {event.steps}{left}"
    return progress_line(text, done, total, "Steps of both drawings")


def _figures(comparison: Comparison, name: str) -> str:
    dense, other = comparison.dense, comparison.other
    times = dense.seconds_per_step / other.seconds_per_step
    psnr = "equal pictures" if comparison.psnr is None else f"{comparison.psnr:.1f} dB"
    rows = [
        ("", "Dense", name),
        (":--", "--:", "--:"),
        ("seconds per step", f"{dense.seconds_per_step:.3g}", f"{other.seconds_per_step:.3g}"),
        ("speed, × dense", "1", f"**{times:.2f}**"),
        ("logits computed", "100 %", f"{100 * other.logit_fraction:.1f} %"),
        ("PSNR against dense", "–", psnr),
        ("SSIM against dense", "–", "–" if comparison.ssim is None else f"{comparison.ssim:.3f}"),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    untrained = "" if comparison.student.source is not None else f"\n\n{_UNTRAINED}"
    return f"{table}\n\n{_HELP}{untrained}"
