"""Convert tab: fine-tune a pipeline for another attention, show the progress, and offer the result in Compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import gradio as gr

from dit_accel.common.choices import Recipe, Train
from dit_accel.common.errors import BadInput
from dit_accel.comparison.sizes import token_grid
from dit_accel.conversion.recipes.recipe import RECIPES

from .controls import MechanismControls, check_fits
from .engine import MAX_WAITING, Cancelled, Engine
from .status import duration, progress_line, status_line, waiting_line
from .training import ConversionOptions, Converted, command_line, convert, expected_seconds, is_embedded
from .training_plots import distance_figure, loss_figure
from .training_watch import Distance, Drawn, Preparing, Step
from .work import Stops, Waiting, message_for, stream

__all__ = ["build"]

_KIND_NAMES = {"image": "Image", "video": "Video"}
_RECIPES = {
    "clear": (
        "CLEAR: distillation and data",
        "Targets: the dense pipeline's predictions, its attention outputs, and data.",
    ),
    "sla": ("SLA: data only", "The training objective of the pipeline itself."),
    "lit": ("LiT: distillation and data", "Targets: the dense pipeline's predictions, and data."),
    "attention-transfer": (
        "LoLCATs: attention transfer, then data",
        "First each layer is trained to match dense attention's output, then LoRA is trained on data.",
    ),
    "linvideo": (
        "LinVideo: layer selection and distillation",
        "Learns which half of the layers to convert, then distills the dense pipeline.",
    ),
}
_TRAIN = {
    "lora": (
        "LoRA on attention layers",
        "Low-rank matrices and the parameters of the mechanism: a small file.",
    ),
    "new": ("Parameters of the mechanism", "SLA's linear branch; CLEAR, LLSA and GNA have none."),
    "attention": ("Attention layers", "All of their weights, and the parameters of the mechanism."),
    "full": ("The whole denoiser", "All weights: the largest file."),
    "": ("Set by the recipe", "Its stages train different parameters."),
}
_LORA_RATE = 3e-3  # measured: at 1e-3 the loss decreases more slowly
_STEPS, _MAX_STEPS = 40, 1000
_MAX_PROMPTS, _MAX_CHARACTERS = 50, 2000
_IDLE = (
    "Press Convert. A copy of the pipeline is trained, so Compare keeps working as before. Requests of other pages "
    "wait until the conversion ends."
)
_HELP = (
    "*Distance to dense*: squared error of the predictions against the dense pipeline's, relative to their squared "
    "norm, on a few fixed noisy samples. *Loss*: training loss of each step; samples and noise differ from step to "
    "step, so it fluctuates."
)


def build(engine: Engine) -> None:
    """Build the components of the tab and their event handlers."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            controls = _Controls(engine)
            with gr.Row():
                run = gr.Button("Convert", variant="primary", elem_id="convert-run")
                cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="convert-cancel")
            restart = gr.Button("Start over", size="sm", visible=False, elem_id="convert-restart")
        with gr.Column(scale=3, min_width=320):
            view = _View(run, cancel, restart)
    requests = _Requests(engine, controls, view)
    for button, handler in ((run, requests.resume), (restart, requests.restart)):
        button.click(
            handler, controls.inputs, view.outputs, concurrency_id="convert", concurrency_limit=MAX_WAITING + 2,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
    cancel.click(requests.cancel, None, None, queue=False, show_progress="hidden", api_visibility="private")


class _Controls:
    """Controls for pipeline, attention and training. ``read`` takes the values of ``inputs``."""

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
            [(label, name) for name, (label, _) in _TRAIN.items()], value="lora", label="Trained parameters",
            info=_TRAIN["lora"][1], filterable=False, elem_id="convert-train",
        )  # fmt: skip
        with gr.Row():
            self.steps = gr.Slider(
                4, 400, _STEPS, step=1, precision=0, label="Steps", min_width=160, elem_id="convert-steps"
            )
            self.lr = gr.Number(
                _LORA_RATE,
                label="Learning rate",
                min_width=140,
                info="Empty: the recipe's default.",
                elem_id="convert-rate",
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

    def read(
        self, kind: str, recipe: Recipe, train: Train | Literal[""], steps: Any, lr: Any, prompts: Any, *mechanism: Any
    ) -> ConversionOptions:
        """Return the validated options.

        Raises: BadInput.
        """
        loaded = self.engine.about(kind)
        attention = self.mechanism.student(kind, *mechanism)
        if isinstance(attention, str):
            raise BadInput("Choose an attention from the list.")
        check_fits(attention, token_grid(loaded.pipe, loaded.size))
        if recipe not in RECIPES or train not in _TRAIN:
            raise BadInput("Choose a recipe and the trained parameters from the lists.")
        if isinstance(steps, bool) or not isinstance(steps, (int, float)) or not 1 <= steps <= _MAX_STEPS:
            raise BadInput(f"The number of steps must be from 1 to {_MAX_STEPS}.")
        if lr is not None and not (isinstance(lr, (int, float)) and 0 < lr <= 1):
            raise BadInput("The learning rate must be above 0 and at most 1; leave it empty for the recipe's default.")
        own = train and not RECIPES[recipe].fixes_train
        return ConversionOptions(
            kind, attention, recipe, (train or None) if own else None, int(steps), lr, _parse_prompts(prompts)
        )

    def _prompts(self, kind: str) -> str:
        about = self.engine.about(kind)
        return about.prompts[-1] if is_embedded(about.source) else "\n".join(about.prompts)

    def _estimate(self, kind: str, steps: float) -> str:
        data = "rendered scenes" if is_embedded(self.engine.about(kind).source) else "samples of the pipeline itself"
        seconds = expected_seconds(self.engine, kind, int(steps or 0))
        if seconds is None:
            return f"Training data: {data}. The remaining time is shown after the first steps."
        return f"Training data: {data}. It takes **about {duration(seconds)}** here if nothing else is running."


def _prompts_label(source: str) -> str:
    if is_embedded(source):
        return "Prompt of the pictures on the right"
    return "Prompts, one per line: the pipeline draws its training samples from them"


def _parse_prompts(prompts: Any) -> tuple[str, ...]:
    """Split prompts into lines.

    Raises: BadInput.
    """
    lines = tuple(line.strip() for line in str(prompts or "").splitlines() if line.strip())
    if not lines:
        raise BadInput("The prompt is empty: write what to draw.")
    if len(lines) > _MAX_PROMPTS or max(map(len, lines)) > _MAX_CHARACTERS:
        raise BadInput(f"At most {_MAX_PROMPTS} prompts of at most {_MAX_CHARACTERS:,} characters are allowed.")
    return lines


def _for_recipe(recipe: str, train: str) -> list[Any]:
    """Updates after a change of the recipe; some recipes fix the trained parameters."""
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
    """Right side of the tab. Methods return updates for ``outputs``."""

    def __init__(self, run: gr.Button, cancel: gr.Button, restart: gr.Button) -> None:
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
            "run": run, "cancel": cancel, "restart": restart, "status": self.status, "distance": self.distance,
            "loss": self.loss, "teacher": self.teacher, "before": self.before, "now": self.now,
            "result": self.result, "file": self.file, "command": self.command,
        }  # fmt: skip
        self.outputs: list[Any] = list(self.named.values())

    def update(self, **changed: Any) -> list[Any]:
        return [changed.get(name, gr.skip()) for name in self.named]

    def begin(self) -> list[Any]:
        return self.update(
            run=gr.Button(interactive=False), restart=gr.Button(interactive=False), cancel=gr.Button(interactive=True),
            status=status_line("Starting …"), result="", file=gr.DownloadButton(visible=False),
            command=gr.Code(visible=False), distance=None, loss=None,
            teacher=gr.Image(None), before=gr.Image(None), now=gr.Image(None, label="Trained"),
        )  # fmt: skip

    def end(self, **changed: Any) -> list[Any]:
        return self.update(
            run=gr.Button(interactive=True), cancel=gr.Button(interactive=False),
            restart=gr.Button(interactive=True, visible=True), **changed,
        )  # fmt: skip


class _Run:
    """Events of one conversion as updates of the page."""

    def __init__(self, view: _View) -> None:
        self.view, self.distances, self.step, self.steps = view, dict[int, float](), 0, 1

    def show_event(self, event: Waiting | Preparing | Step | Distance | Drawn | None) -> list[Any]:
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

    def show_result(self, event: Converted, command: str) -> list[Any]:
        done = (
            "Done."
            if event.new_steps
            else "Already converted with these settings: raise the steps to continue, or start over."
        )
        return self.view.end(
            status=status_line(done), result=self._result(event), command=gr.Code(command, visible=True),
            file=gr.DownloadButton(value=str(event.file), visible=True),
        )  # fmt: skip

    def _result(self, event: Converted) -> str:
        size = event.file.stat().st_size / 1e6
        offer = f"**Compare** now offers “{event.label}”, under *Attention to compare*. File size: {size:.1f} MB."
        steps = sorted(self.distances)
        if len(steps) < 2:
            return offer
        first, last = (100 * self.distances[step] for step in (steps[0], steps[-1]))
        distance = f"The distance to dense went from {_percent(first)} to **{_percent(last)}**"
        return f"{distance}. To continue, raise the steps and press Convert. {offer}"


class _Requests:
    """Event handlers of the buttons."""

    def __init__(self, engine: Engine, controls: _Controls, view: _View) -> None:
        self.engine, self.controls, self.view = engine, controls, view
        self.stops = Stops()

    def resume(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        yield from self._run(values, False, request)

    def restart(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        yield from self._run(values, True, request)

    def _run(self, values: Sequence[Any], restart: bool, request: gr.Request) -> Iterator[list[Any]]:
        stop, shown = self.stops.begin(str(request.session_hash)), _Run(self.view)
        yield self.view.begin()
        try:
            options = self.controls.read(*values)
            command = command_line(self.engine, options)
            for event in stream(lambda report: convert(self.engine, options, restart, stop, report), stop):
                yield shown.show_result(event, command) if isinstance(event, Converted) else shown.show_event(event)
        except Cancelled:
            message = f"Stopped at step {shown.step}. Convert resumes from there; Start over does not."
            yield self.view.end(status=status_line(message))
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
