"""The Convert tab: a pipeline is fine-tuned into an attention while one looks on, and Compare offers the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from dit_accel.compare.sizes import token_grid
from dit_accel.convert.recipes import RECIPES
from dit_accel.errors import BadInput

from .controls import MechanismControls, check_fits
from .engine import MOST_WAITING, Cancelled, Engine
from .status import duration, progress_line, status_line, waiting_line
from .training import Converted, Wish, command_line, convert, expected_seconds, is_embedded
from .training_plots import distance_figure, loss_figure
from .training_watch import Distance, Drawn, Preparing, Step
from .work import Stops, Waiting, message_for, stream

__all__ = ["build"]

_KIND_NAMES = {"image": "Image", "video": "Video"}
_RECIPES = {
    "clear": (
        "CLEAR: imitate, and learn from data",
        "The dense pipeline's predictions, its attention outputs, and data.",
    ),
    "sla": ("SLA: learn from data", "Data alone, just as the pipeline itself was trained."),
    "lit": ("LiT: imitate predictions, and data", "The dense pipeline's predictions, and data."),
    "attention-transfer": (
        "LoLCATs: layer by layer, then data",
        "First each layer imitates what dense attention gives it; then LoRA learns from data.",
    ),
    "linvideo": (
        "LinVideo: choose layers, and imitate",
        "Learns which half of the layers to convert, then to draw as the dense pipeline does.",
    ),
}
_TRAIN = {
    "lora": (
        "LoRA on attention layers",
        "Small matrices beside the weights, and what the attention adds: a small file.",
    ),
    "new": ("What the attention adds", "Parameters of SLA's linear branch; CLEAR, LLSA and GNA add none."),
    "attention": ("All of the attention layers", "Their own weights, and what the attention adds."),
    "full": ("The whole denoiser", "All weights: the largest file."),
    "": ("What the recipe says", "Its stages train different things."),
}
_LORA_RATE = 3e-3  # measured: at 1e-3 the loss falls more slowly
_STEPS, _MOST_STEPS = 40, 1000
_MOST_PROMPTS, _MOST_CHARACTERS = 50, 2000
_IDLE = (
    "Press Convert. A copy of the pipeline is trained, so Compare keeps working as before; whoever else "
    "asks for something meanwhile waits."
)
_HELP = (
    "*Distance to dense*: how far the predictions are from the dense pipeline's on a few noisy samples that stay the "
    "same: squared, in % of the latter's square. *Loss*: what each step minimises, on other samples and noise every "
    "time, so it jumps about."
)


def build(engine: Engine) -> None:
    """The tab's components and what they do."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            controls = _Controls(engine)
            with gr.Row():
                run = gr.Button("Convert", variant="primary", elem_id="convert-run")
                cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="convert-cancel")
            anew = gr.Button("Begin anew", size="sm", visible=False, elem_id="convert-anew")
        with gr.Column(scale=3, min_width=320):
            view = _View(run, cancel, anew)
    requests = _Requests(engine, controls, view)
    for button, handler in ((run, requests.go_on), (anew, requests.begin_anew)):
        button.click(
            handler, controls.inputs, view.outputs, concurrency_id="convert", concurrency_limit=MOST_WAITING + 2,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
    cancel.click(requests.cancel, None, None, queue=False, show_progress="hidden", api_visibility="private")


class _Controls:
    """What is converted into what, and how. ``read(*values of inputs)`` gives the wish."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        about = engine.about(engine.kinds[0])
        choices = [(_KIND_NAMES[kind], kind) for kind in engine.kinds]
        self.kind = gr.Radio(choices, value=about.kind, label="Pipeline", visible=len(choices) > 1)
        self.mechanism = MechanismControls(engine, trained=False, first="clear", label="Attention to convert to")
        self.mechanism.follow(self.kind)
        self.recipe = gr.Dropdown(
            [(label, name) for name, (label, _) in _RECIPES.items()], value="clear", label="Recipe", filterable=False,
            info=_RECIPES["clear"][1], elem_id="convert-recipe",
        )  # fmt: skip
        self.train = gr.Dropdown(
            [(label, name) for name, (label, _) in _TRAIN.items()], value="lora", label="What is trained",
            info=_TRAIN["lora"][1], filterable=False, elem_id="convert-train",
        )  # fmt: skip
        with gr.Row():
            self.steps = gr.Slider(
                4, 400, _STEPS, step=1, precision=0, label="Steps", min_width=160, elem_id="convert-steps"
            )
            self.lr = gr.Number(
                _LORA_RATE, label="Learning rate", min_width=140, info="Empty: the recipe's.", elem_id="convert-rate"
            )
        self.prompts = gr.Textbox(
            value=self._prompts(about.kind), label=_prompts_label(about.source), lines=2, max_lines=8,
            elem_id="convert-prompts",
        )  # fmt: skip
        self.estimate = gr.Markdown(self._estimate(about.kind, _STEPS), elem_id="convert-estimate")
        self.inputs: list[Any] = [
            self.kind, self.recipe, self.train, self.steps, self.lr, self.prompts, *self.mechanism.inputs,
        ]  # fmt: skip
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        self.recipe.input(_for_recipe, [self.recipe, self.train], [self.recipe, self.train, self.lr], **quiet)
        self.train.input(_for_train, self.train, [self.train, self.lr], **quiet)
        self.kind.change(self._prompts, self.kind, self.prompts, **quiet)
        gr.on([self.kind.change, self.steps.change], self._estimate, [self.kind, self.steps], self.estimate, **quiet)

    def read(self, kind: str, recipe: str, train: str, steps: Any, lr: Any, prompts: Any, *mechanism: Any) -> Wish:
        """Raises: BadInput."""
        loaded = self.engine.about(kind)
        attention = self.mechanism.student(kind, *mechanism)
        if isinstance(attention, str):
            raise BadInput("Choose an attention from the list.")
        check_fits(attention, token_grid(loaded.pipe, loaded.size))
        if recipe not in RECIPES or train not in _TRAIN:
            raise BadInput("Choose a recipe, and what is trained, from the lists.")
        if isinstance(steps, bool) or not isinstance(steps, (int, float)) or not 1 <= steps <= _MOST_STEPS:
            raise BadInput(f"The number of steps must be from 1 to {_MOST_STEPS}.")
        if lr is not None and not (isinstance(lr, (int, float)) and 0 < lr <= 1):
            raise BadInput("The learning rate must be above 0 and at most 1; leave it empty for the recipe's.")
        own = train and not RECIPES[recipe].fixes_train
        return Wish(kind, attention, recipe, train if own else None, int(steps), lr, _lines(prompts))

    def _prompts(self, kind: str) -> str:
        about = self.engine.about(kind)
        return about.prompts[-1] if is_embedded(about.source) else "\n".join(about.prompts)

    def _estimate(self, kind: str, steps: float) -> str:
        data = "rendered scenes" if is_embedded(self.engine.about(kind).source) else "what the pipeline itself draws"
        seconds = expected_seconds(self.engine, kind, int(steps or 0))
        if seconds is None:
            return f"It is trained on {data}. How long it takes is told after the first steps."
        return f"It is trained on {data}, and takes **about {duration(seconds)}** here if nothing else is running."


def _prompts_label(source: str) -> str:
    if is_embedded(source):
        return "Prompt of the pictures on the right"
    return "Prompts, one on a line: the pipeline draws from them what it is trained on"


def _lines(prompts: Any) -> tuple[str, ...]:
    """Raises: BadInput."""
    lines = tuple(line.strip() for line in str(prompts or "").splitlines() if line.strip())
    if not lines:
        raise BadInput("The prompt is empty: write what to draw.")
    if len(lines) > _MOST_PROMPTS or max(map(len, lines)) > _MOST_CHARACTERS:
        raise BadInput(f"At most {_MOST_PROMPTS} prompts of at most {_MOST_CHARACTERS:,} characters are taken.")
    return lines


def _for_recipe(recipe: str, train: str) -> list[Any]:
    """What a recipe with several stages trains is its own affair."""
    if recipe not in RECIPES:
        return [gr.skip()] * 3
    fixed = RECIPES[recipe].fixes_train
    train = "" if fixed else train or "lora"
    about = gr.Dropdown(value=train, info=_TRAIN[train][1], interactive=not fixed)
    return [gr.Dropdown(info=_RECIPES[recipe][1]), about, _rate_of(train)]


def _for_train(train: str) -> list[Any]:
    return [gr.Dropdown(info=_TRAIN[train][1]), _rate_of(train)] if train in _TRAIN else [gr.skip()] * 2


def _rate_of(train: str) -> float | None:
    return _LORA_RATE if train == "lora" else None


class _View:
    """The right side: what is shown, as updates for ``outputs``."""

    def __init__(self, run: gr.Button, cancel: gr.Button, anew: gr.Button) -> None:
        self.status = gr.HTML(status_line(_IDLE), elem_id="convert-status")
        with gr.Row():
            self.distance = gr.Plot(show_label=False, min_width=260, elem_id="convert-distance")
            self.loss = gr.Plot(show_label=False, min_width=260, elem_id="convert-loss")
        with gr.Row():
            shown: dict[str, Any] = {"interactive": False, "min_width": 150, "buttons": ["fullscreen"], "height": 230}
            self.teacher = gr.Image(label="Dense", elem_id="convert-teacher", **shown)
            self.before = gr.Image(label="Not trained", elem_id="convert-before", **shown)
            self.now = gr.Image(label="Trained", elem_id="convert-now", **shown)
        self.result = gr.Markdown(elem_id="convert-result")
        self.file = gr.DownloadButton(
            "Download dit_accel.safetensors", visible=False, variant="primary", elem_id="convert-file"
        )
        self.command = gr.Code(
            language="shell", label="The same in a shell", interactive=False, visible=False, wrap_lines=True, lines=1,
            show_line_numbers=False,
            elem_id="convert-command",
        )  # fmt: skip
        gr.Markdown(_HELP)
        self.named = {
            "run": run, "cancel": cancel, "anew": anew, "status": self.status, "distance": self.distance,
            "loss": self.loss, "teacher": self.teacher, "before": self.before, "now": self.now,
            "result": self.result, "file": self.file, "command": self.command,
        }  # fmt: skip
        self.outputs: list[Any] = list(self.named.values())

    def update(self, **changed: Any) -> list[Any]:
        return [changed.get(name, gr.skip()) for name in self.named]

    def begin(self) -> list[Any]:
        return self.update(
            run=gr.Button(interactive=False), anew=gr.Button(interactive=False), cancel=gr.Button(interactive=True),
            status=status_line("Starting …"), result="", file=gr.DownloadButton(visible=False),
            command=gr.Code(visible=False), distance=None, loss=None,
            teacher=gr.Image(None), before=gr.Image(None), now=gr.Image(None, label="Trained"),
        )  # fmt: skip

    def end(self, **changed: Any) -> list[Any]:
        return self.update(
            run=gr.Button(interactive=True), cancel=gr.Button(interactive=False),
            anew=gr.Button(interactive=True, visible=True), **changed,
        )  # fmt: skip


class _Shown:
    """What one request has told so far, as updates of the page."""

    def __init__(self, view: _View) -> None:
        self.view, self.distances, self.step, self.steps = view, dict[int, float](), 0, 1

    def news(self, event: Waiting | Preparing | Step | Distance | Drawn | None) -> list[Any]:
        if isinstance(event, Waiting):
            return self.view.update(status=waiting_line(event.before))
        if isinstance(event, Preparing):
            return self.view.update(status=_preparing(event))
        if isinstance(event, Distance):
            self.distances[event.step] = event.value
            return self.view.update(distance=distance_figure(self.distances, self.steps))
        if isinstance(event, Drawn):
            return self._drawn(event)
        return self._step(event) if isinstance(event, Step) else self.view.update()

    def _step(self, event: Step) -> list[Any]:
        self.step, self.steps = event.step, event.steps
        left = "" if event.seconds_left is None else f" · about {duration(event.seconds_left)} left"
        status = progress_line(f"Step {event.step} of {event.steps}{left}", event.step, event.steps, "Steps")
        return self.view.update(status=status, loss=loss_figure(event.history, event.steps))

    def _drawn(self, event: Drawn) -> list[Any]:
        changed: dict[str, Any] = {"teacher": gr.Image(event.teacher)}
        if event.step == 0:
            changed["before"] = gr.Image(event.student)
        else:
            changed["now"] = gr.Image(event.student, label=f"Trained, step {event.step}")
        return self.view.update(**changed)

    def finished(self, event: Converted, command: str) -> list[Any]:
        done = "Done." if event.new_steps else "This had been done already: raise the steps to go on, or begin anew."
        return self.view.end(
            status=status_line(done), result=self._result(event), command=gr.Code(command, visible=True),
            file=gr.DownloadButton(value=str(event.file), visible=True),
        )  # fmt: skip

    def _result(self, event: Converted) -> str:
        size = event.file.stat().st_size / 1e6
        told = f"**Compare** now offers “{event.label}”, under *Attention to compare*. The file has {size:.1f} MB."
        steps = sorted(self.distances)
        if len(steps) < 2:
            return told
        first, last = (100 * self.distances[step] for step in (steps[0], steps[-1]))
        fell = f"The distance to dense went from {_percent(first)} to **{_percent(last)}**"
        return f"{fell}; with more steps Convert goes on. {told}"


class _Requests:
    """What the buttons do."""

    def __init__(self, engine: Engine, controls: _Controls, view: _View) -> None:
        self.engine, self.controls, self.view = engine, controls, view
        self.stops = Stops()

    def go_on(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        yield from self._run(values, False, request)

    def begin_anew(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        yield from self._run(values, True, request)

    def _run(self, values: Sequence[Any], anew: bool, request: gr.Request) -> Iterator[list[Any]]:
        stop, shown = self.stops.begin(str(request.session_hash)), _Shown(self.view)
        yield self.view.begin()
        try:
            wish = self.controls.read(*values)
            command = command_line(self.engine, wish)
            for event in stream(lambda tell: convert(self.engine, wish, anew, stop, tell), stop):
                yield shown.finished(event, command) if isinstance(event, Converted) else shown.news(event)
        except Cancelled:
            said = f"Stopped at step {shown.step}. Convert goes on from there, Begin anew does not."
            yield self.view.end(status=status_line(said))
        except Exception as error:
            yield self.view.end(status=status_line(message_for(error), problem=True))

    def cancel(self, request: gr.Request) -> None:
        self.stops.end(str(request.session_hash))


def _preparing(event: Preparing) -> str:
    if event.done == event.total:
        return status_line("Drawing with dense attention …")
    return progress_line("Preparing samples …", event.done, event.total or 2 * event.done, "Samples")


def _percent(value: float) -> str:
    return f"{value:.2g} %"
