"""Controls for prompt, seed, size, steps and attention options, and validation of their values."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from dit_accel.common.errors import BadInput
from dit_accel.comparison.sizes import Size, check_size, token_grid
from dit_accel.mechanisms.attn_spec import AttentionSpec, grid_defaults

from .engine import Engine, Loaded

__all__ = ["DrawingControls", "DrawingOptions", "MechanismControls", "check_drawing", "check_fits"]

MAX_CHARACTERS = 2000
MAX_STEPS = 100
MAX_RELATIVE_SIZE = 4  # times the pipeline's default number of pixels: limits memory
_MAX_SEED = 2**32 - 1
_KIND_NAMES = {"image": "Image", "video": "Video"}
_MECHANISMS = {
    "sla": "SLA: critical blocks, linear attention for the rest",
    "clear": "CLEAR: circular window around each token",
    "llsa": "LLSA: top-k blocks, selected from coarse to fine",
    "gna": "GNA: sliding window with a stride",
}
_SHOWN_FOR = {
    "sla": ("critical",),
    "clear": ("radius", "radius_time"),
    "llsa": ("topk",),
    "gna": ("window", "window_time", "stride"),
}
_ONLY_VIDEO = ("radius_time", "window_time")


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
        raise BadInput(f"The {name} must be a whole number.")
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
        if choice not in _MECHANISMS:
            raise BadInput("Choose an attention from the list.")
        spec = _spec(choice, len(self._grid(kind)), dict(zip(self.sliders, values, strict=True)))
        try:
            spec.processor()
        except (ValueError, TypeError) as error:
            raise BadInput(f"{choice.upper()}: {error}") from None
        return spec

    def _grid(self, kind: str) -> tuple[int, ...]:
        about = self.engine.about(kind)
        return token_grid(about.pipe, about.size) or ((16, 64, 64) if kind == "video" else (64, 64))

    def _choices(self, kind: str) -> list[tuple[str, str]]:
        trained = self.engine.conversions(kind) if self.trained else {}
        return [(label, name) for name, label in _MECHANISMS.items()] + [(label, label) for label in trained]

    def _sliders(self, kind: str) -> dict[str, gr.Slider]:
        shown, own = _shown(kind, self.first), _default_values(self._grid(kind))
        side = max(self._grid(kind)[-2:])
        frames = self._grid(kind)[0] if kind == "video" else 1
        return {
            "critical": gr.Slider(
                0.01, 0.9, own["critical"], step=0.01, label="Critical fraction", visible="critical" in shown,
                info="Share of key blocks that each query block attends to exactly.",
            ),
            "radius": gr.Slider(
                1, side, own["radius"], step=0.5, label="Radius, in tokens", visible="radius" in shown,
                info="Each token attends to the tokens within this distance.",
            ),
            "radius_time": gr.Slider(
                0.5, max(frames, 1), own["radius_time"], step=0.5, label="Radius in time, in tokens",
                visible="radius_time" in shown, info="The same along the time axis.",
            ),
            "topk": gr.Slider(
                1, 64, own["topk"], step=1, precision=0, label="Blocks kept (topk)", visible="topk" in shown,
                info="Number of blocks of 16 tokens that are kept at each level.",
            ),
            "window": gr.Slider(
                1, side, own["window"], step=1, precision=0, label="Window, in tokens", visible="window" in shown,
                info="Side of the square window of each token.",
            ),
            "window_time": gr.Slider(
                1, max(frames, 2), own["window_time"], step=1, precision=0, label="Window in time, in tokens",
                visible="window_time" in shown, info="The same along the time axis.",
            ),
            "stride": gr.Slider(
                1, side, own["stride"], step=1, precision=0, label="Stride, in tokens", visible="stride" in shown,
                info="Number of neighbours that share one window; 1 = one window per token. At most the window.",
            ),
        }  # fmt: skip

    def _for_kind(self, kind: str) -> list[Any]:
        grid = self._grid(kind)
        own, side, frames = _default_values(grid), max(grid[-2:]), grid[0] if kind == "video" else 1
        maxima = {"radius": side, "window": side, "stride": side, "radius_time": frames, "window_time": max(frames, 2)}
        choices = self._choices(kind)
        shown = _shown(kind, self.first)
        sliders = [
            gr.Slider(
                value=own[name], visible=name in shown, maximum=maxima.get(name, slider.maximum)
            )
            for name, slider in self.sliders.items()
        ]  # fmt: skip
        return [kind, gr.Dropdown(choices=choices, value=self.first), *sliders]

    def _visibility(self, kind: str, choice: str) -> list[Any]:
        shown = _shown(kind, choice)
        return [gr.Slider(visible=name in shown) for name in self.sliders]

    def _refresh_choices(self, kind: str) -> Any:
        """The list only: the answer may arrive after the user has chosen, and must not undo it."""
        return gr.Dropdown(choices=self._choices(kind))


def _shown(kind: str, choice: str) -> list[str]:
    names = _SHOWN_FOR.get(choice, ())
    return [name for name in names if kind == "video" or name not in _ONLY_VIDEO]


def _default_values(grid: tuple[int, ...]) -> dict[str, Any]:
    """Slider values for the default options on this grid."""
    radius, gna = grid_defaults("clear", grid)["radius"], grid_defaults("gna", grid)
    radii = radius if isinstance(radius, tuple) else (radius,) * len(grid)
    in_time = {"radius_time": round(2 * radii[0]) / 2, "window_time": gna["window"][0]}
    return {
        "critical": grid_defaults("sla", grid)["critical"], "radius": round(2 * radii[-1]) / 2, "topk": 8,
        "window": gna["window"][-1], "stride": gna["stride"][-1],
        **(in_time if len(grid) == 3 else dict.fromkeys(in_time, 1)),
    }  # fmt: skip


def _spec(name: str, axes: int, values: dict[str, Any]) -> AttentionSpec:
    if name == "sla":
        return AttentionSpec(name, {"critical": values["critical"], "tile_order": True})
    if name == "llsa":
        return AttentionSpec(name, {"topk": values["topk"]})
    if name == "clear":
        radius, time = values["radius"], values["radius_time"]
        return AttentionSpec(name, {"radius": (time, radius, radius) if axes == 3 else radius})
    window, stride = values["window"], values["stride"]
    if axes < 3:
        return AttentionSpec(name, {"window": (window,) * axes, "stride": (stride,) * axes})
    time = values["window_time"]
    return AttentionSpec(name, {"window": (time, window, window), "stride": (min(stride, time), stride, stride)})
