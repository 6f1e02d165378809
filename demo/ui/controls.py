"""Controls for prompt, seed, size, steps and attention options, and validation of their values."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from dit_accel.common.errors import BadInput
from dit_accel.comparison.sizes import Size, check_size, token_grid
from dit_accel.mechanisms._controls import Control
from dit_accel.mechanisms.attn_spec import AttentionSpec
from dit_accel.mechanisms.registry import PROCESSORS, untrained_mechanisms

from .engine import Engine, Loaded

__all__ = ["DrawingControls", "DrawingOptions", "MechanismControls", "check_drawing", "check_fits"]

MAX_CHARACTERS = 2000
MAX_STEPS = 100
MAX_RELATIVE_SIZE = 4  # times the pipeline's default number of pixels: limits memory
_MAX_SEED = 2**32 - 1
_KIND_NAMES = {"image": "Image", "video": "Video"}


@dataclass(frozen=True)
class DrawingOptions:
    """Validated options of a drawing."""

    kind: str
    prompt: str
    seed: int
    size: Size
    steps: int


def check_drawing(
    loaded: Loaded, prompt: Any, seed: Any, height: Any, width: Any, frames: Any, steps: Any
) -> DrawingOptions:
    """Validate the options of a drawing.

    Raises: BadInput: a value that has to be changed.
    """
    text = prompt.strip() if isinstance(prompt, str) else ""
    if not text:
        raise BadInput("The prompt is empty: write what to draw, or click on an example.")
    if len(text) > MAX_CHARACTERS:
        raise BadInput(f"The prompt has {len(text):,} characters; at most {MAX_CHARACTERS:,} are allowed. Shorten it.")
    size = Size(
        _check_integer("height", height, 1), _check_integer("width", width, 1),
        _check_integer("number of frames", frames, 1) if loaded.size.frames is not None else None,
    )  # fmt: skip
    check_size(loaded.pipe, size)
    _check_cost(loaded.size, size)
    return DrawingOptions(
        loaded.kind, text, _check_integer("seed", seed, 0, _MAX_SEED), size,
        _check_integer("steps", steps, 1, MAX_STEPS),
    )  # fmt: skip


def _check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not float(value).is_integer():
        raise BadInput(f"The {name} must be an integer.")
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise BadInput(f"The {name} must be {limits}, got {int(value)}.")
    return int(value)


def _check_cost(own: Size, size: Size) -> None:
    n_pixels = size.height * size.width * (size.frames or 1)
    if n_pixels > MAX_RELATIVE_SIZE * own.height * own.width * (own.frames or 1):
        raise BadInput(
            f"{size} is too large for this page: at most {MAX_RELATIVE_SIZE} times the pipeline's default {own} is "
            "allowed. Choose a smaller size."
        )


def check_fits(spec: AttentionSpec | str, grid: tuple[int, ...] | None) -> None:
    """Check that the window fits the token grid.

    Raises: BadInput: a window that is larger than the grid.
    """
    window = spec.options.get("window") if isinstance(spec, AttentionSpec) else None
    if window is None or grid is None:
        return
    window = window if isinstance(window, tuple) else (window,) * len(grid)
    if any(length > tokens for length, tokens in zip(window, grid, strict=True)):
        raise BadInput(
            f"The window of {_join_lengths(window)} tokens is larger than the grid of {_join_lengths(grid)} tokens "
            "of this size. Choose a smaller window or a larger size."
        )


def _join_lengths(lengths: Sequence[int]) -> str:
    return "×".join(map(str, lengths))


class DrawingControls:
    """Kind, prompt with examples, seed, size and steps.

    Create it inside a layout. ``read`` takes the values of ``inputs``.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        about = engine.about(engine.kinds[0])
        choices = [(_KIND_NAMES[kind], kind) for kind in engine.kinds]
        self.kind = gr.Radio(choices, value=about.kind, label="What to draw", visible=len(choices) > 1)
        self.prompt = gr.Textbox(label="Prompt", value=about.prompts[0], lines=2, max_lines=6)
        self.examples = gr.Dataset(
            components=[self.prompt], samples=_samples(about), sample_labels=list(about.prompts), layout="gallery",
            label="Examples: click one",
        )  # fmt: skip
        with gr.Accordion("Size, steps and seed", open=False):
            with gr.Row():
                self.width = gr.Number(about.size.width, label="Width", precision=0, min_width=90)
                self.height = gr.Number(about.size.height, label="Height", precision=0, min_width=90)
                self.frames = gr.Number(
                    about.size.frames or 1, label="Frames", precision=0, min_width=90, visible=about.kind == "video"
                )
            self.steps = gr.Slider(1, MAX_STEPS, about.steps, step=1, precision=0, label="Steps")
            with gr.Row():
                self.seed = gr.Number(0, label="Seed", precision=0, min_width=120)
                dice = gr.Button("Another seed", size="md", min_width=120, elem_classes="at-the-bottom")
        self.inputs: list[Any] = [
            self.kind, self.prompt, self.seed, self.height, self.width, self.frames, self.steps,
        ]  # fmt: skip
        self.examples.click(_only_prompt, self.examples, self.prompt, queue=False, api_visibility="private")
        dice.click(_another_seed, None, self.seed, queue=False, api_visibility="private")
        self.kind.change(
            self._for_kind, self.kind,
            [self.prompt, self.examples, self.height, self.width, self.frames, self.steps],
            queue=False, api_visibility="private",
        )  # fmt: skip

    def read(
        self, kind: str, prompt: Any, seed: Any, height: Any, width: Any, frames: Any, steps: Any
    ) -> tuple[Loaded, DrawingOptions]:
        """Return the pipeline and the validated options.

        Raises: BadInput.
        """
        loaded = self.engine.about(kind)
        return loaded, check_drawing(loaded, prompt, seed, height, width, frames, steps)

    def _for_kind(self, kind: str) -> list[Any]:
        about = self.engine.about(kind)
        return [
            about.prompts[0], gr.Dataset(samples=_samples(about), sample_labels=list(about.prompts)),
            about.size.height, about.size.width,
            gr.Number(about.size.frames or 1, visible=kind == "video"), about.steps,
        ]  # fmt: skip


def _samples(about: Loaded) -> list[list[str]]:
    return [[prompt] for prompt in about.prompts]


def _only_prompt(sample: list[str]) -> str:
    return sample[0]


def _another_seed() -> int:
    return random.randrange(10_000)


class MechanismControls:
    """The attention and its sliders.

    Create it inside a layout. ``student`` takes the kind and the values of ``inputs``.

    Args:
        kind: initial kind; ``follow(radio)`` keeps it in step with a radio button.
        trained: also offer converted weights.
        first: initial choice.
    """

    def __init__(
        self, engine: Engine, kind: str | None = None, trained: bool = True, first: str = "sla",
        label: str = "Attention to compare",
    ) -> None:  # fmt: skip
        self.engine, self.trained, self.first = engine, trained, first
        kind = kind or engine.kinds[0]
        choices = self._choices(kind)
        self.choice = gr.Dropdown(choices, value=first, label=label, filterable=False)
        self.sliders = self._sliders(kind)
        self.inputs: list[Any] = [self.choice, *self.sliders.values()]
        self._kind = gr.State(kind)
        self.choice.change(
            self._visibility, [self._kind, self.choice], list(self.sliders.values()), queue=False,
            api_visibility="private", show_progress="hidden",
        )  # fmt: skip
        if trained:  # conversions may have been added in the meantime
            self.choice.focus(
                self._refresh_choices, self._kind, self.choice, queue=False, api_visibility="private",
                show_progress="hidden",
            )  # fmt: skip

    def follow(self, radio: gr.Radio) -> None:
        """Update kind and defaults when the radio button changes."""
        radio.change(
            self._for_kind, radio, [self._kind, *self.inputs], queue=False, api_visibility="private",
            show_progress="hidden",
        )  # fmt: skip

    def student(self, kind: str, choice: str, *values: float) -> AttentionSpec | str:
        """Specification or folder, as ``make_students`` takes it.

        Raises: BadInput: options that are invalid at any size.
        """
        folder = self.engine.conversions(kind).get(choice)
        if folder is not None:
            return str(folder)
        if choice not in untrained_mechanisms():
            raise BadInput("Choose an attention from the list.")
        own = {slider: x for (name, slider), x in zip(self.sliders, values, strict=True) if name == choice}
        spec = AttentionSpec(choice, PROCESSORS[choice].from_controls(own, len(self._grid(kind))))
        try:
            spec.processor()
        except (ValueError, TypeError) as error:
            raise BadInput(f"{PROCESSORS[choice].label}: {error}") from None
        return spec

    def _grid(self, kind: str) -> tuple[int, ...]:
        about = self.engine.about(kind)
        return token_grid(about.pipe, about.size) or ((16, 64, 64) if kind == "video" else (64, 64))

    def _choices(self, kind: str) -> list[tuple[str, str]]:
        trained = self.engine.conversions(kind) if self.trained else {}
        untrained = [(f"{PROCESSORS[name].label}: {PROCESSORS[name].summary}", name) for name in untrained_mechanisms()]
        return untrained + [(label, label) for label in trained]

    def _controls(self, kind: str) -> dict[tuple[str, str], Control]:
        """Sliders of all mechanisms for this kind, by the names of mechanism and slider."""
        grid = self._grid(kind)
        return {(name, x.name): x for name in untrained_mechanisms() for x in PROCESSORS[name].controls(grid)}

    def _sliders(self, kind: str) -> dict[tuple[str, str], gr.Slider]:
        """Sliders for all kinds; those of another kind are hidden."""
        own = self._controls(kind)
        controls = {key: x for each in self.engine.kinds for key, x in self._controls(each).items()}
        return {
            key: gr.Slider(**_limits(own.get(key, x)), label=x.label, info=x.help, visible=self._shown(own, key))
            for key, x in sorted(controls.items(), key=lambda item: untrained_mechanisms().index(item[0][0]))
        }

    def _shown(self, controls: Mapping[tuple[str, str], Control], key: tuple[str, str], choice: str = "") -> bool:
        return key in controls and key[0] == (choice or self.first)

    def _for_kind(self, kind: str) -> list[Any]:
        controls = self._controls(kind)
        sliders = [
            gr.Slider(**(_limits(controls[key]) if key in controls else {}), visible=self._shown(controls, key))
            for key in self.sliders
        ]
        return [kind, gr.Dropdown(choices=self._choices(kind), value=self.first), *sliders]

    def _visibility(self, kind: str, choice: str) -> list[Any]:
        controls = self._controls(kind)
        return [gr.Slider(visible=self._shown(controls, key, choice)) for key in self.sliders]

    def _refresh_choices(self, kind: str) -> Any:
        """The list only: the answer may arrive after the user has chosen, and must not undo it."""
        return gr.Dropdown(choices=self._choices(kind))


def _limits(control: Control) -> dict[str, Any]:
    integer = {"precision": 0} if isinstance(control.step, int) else {}
    return {"minimum": control.low, "maximum": control.high, "value": control.value, "step": control.step, **integer}
