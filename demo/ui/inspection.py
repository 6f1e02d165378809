"""Recorded drawings of each open page, and inspection of their attention token by token."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_accel.common.errors import BadInput
from dit_accel.layout import TokenLayout
from dit_accel.mechanisms.attn_spec import AttentionSpec
from dit_accel.mechanisms.processor import AcceleratedAttnProcessor

from .attention_maps import (
    Attended,
    AttentionCall,
    BlockMap,
    Coverage,
    Recording,
    attend,
    block_map,
    coverage,
    record_calls,
    spread_steps,
)
from .controls import DrawingOptions, check_fits
from .engine import Engine, Loaded, Stop
from .plots import overlay
from .preview import Preview

__all__ = ["Drawings", "Drawn", "Inspection", "Position", "Step", "coverage_by_layer", "draw", "inspect_token"]

_STEPS_BETWEEN_PREVIEWS = 2
_SHOWN_BRIGHTEST = 0.999  # quantile of the weights shown brightest, so that a few outliers do not dim the rest


@dataclass
class Drawn:
    """A dense drawing and its attention calls. ``shares`` caches coverage by (processor, step) and layer."""

    wanted: DrawingOptions
    frames: NDArray[np.uint8]  # (F, H, W, 3)
    recording: Recording
    shares: dict[tuple[AcceleratedAttnProcessor, int], dict[str, Coverage]] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        return self.frames.nbytes + self.recording.n_bytes

    @property
    def layers(self) -> list[str]:
        return [layer for layer in self.recording.layers if (self.recording.steps[0], layer) in self.recording.calls]

    def call(self, step: int, layer: str) -> AttentionCall:
        """Return the recorded call.

        Raises: BadInput: the call was not recorded.
        """
        if (step, layer) not in self.recording.calls:
            raise BadInput("This layer and step were not recorded. Choose others, or draw again.")
        return self.recording.calls[step, layer]

    @property
    def token_frames(self) -> int:
        grid = self.call(self.recording.steps[0], self.layers[0]).layout.grid
        return grid[0] if len(grid) == 3 else 1

    def frame(self, token_frame: int) -> NDArray[np.uint8]:
        """(H, W, 3) frame of the clip that belongs to this frame of tokens."""
        last = len(self.frames) - 1
        return self.frames[round(token_frame * last / max(1, self.token_frames - 1))]


class Drawings:
    """Last drawing of each open page; the least recently used are dropped above `max_bytes`."""

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = max_bytes
        self._of_page: OrderedDict[str, Drawn] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, page: str, drawn: Drawn) -> None:
        with self._lock:
            self._of_page.pop(page, None)
            self._of_page[page] = drawn
            while len(self._of_page) > 1 and sum(x.n_bytes for x in self._of_page.values()) > self.max_bytes:
                self._of_page.popitem(last=False)

    def get(self, page: str) -> Drawn:
        """Return the drawing of a page.

        Raises: BadInput: the page has none, or it was dropped.
        """
        with self._lock:
            if page not in self._of_page:
                raise BadInput("There is no drawing to inspect: press Draw.")
            self._of_page.move_to_end(page)
            return self._of_page[page]

    def drop(self, page: str) -> None:
        """Drop the drawing of a page, if any."""
        with self._lock:
            self._of_page.pop(page, None)


@dataclass(frozen=True)
class Step:
    """Progress of a drawing."""

    step: int
    steps: int
    picture: NDArray[np.uint8] | None = None


def draw(engine: Engine, wanted: DrawingOptions, stop: Stop, report: Callable[[Any], None]) -> None:
    """Draw with dense attention; report the number of requests ahead, then Steps, then the Drawn result.

    Raises: what ``Engine.draw`` raises. BadInput: no call fits into memory.
    """
    with (
        engine.turn(wanted.kind, stop, report) as loaded,
        record_calls(loaded.pipe, spread_steps(wanted.steps)) as recording,
    ):
        on_step = _step_callback(loaded, wanted, report)
        drawing = engine.draw(loaded, wanted.prompt, wanted.seed, wanted.size, wanted.steps, stop, on_step)
    if not recording.calls:
        raise BadInput(
            "The attention of this pipeline could not be recorded: a single layer takes too much memory. Choose a "
            "smaller size."
        )
    report(Drawn(wanted, drawing.frames, recording))


def _step_callback(loaded: Loaded, wanted: DrawingOptions, report: Callable[[Any], None]) -> Callable[[int, Any], None]:
    preview = Preview(loaded.pipe, wanted.size)

    def on_step(step: int, latents: Any) -> None:
        preview.update(step, latents)
        due = step % _STEPS_BETWEEN_PREVIEWS == 0 and step < wanted.steps
        report(Step(step, wanted.steps, preview.picture() if due else None))

    return on_step


@dataclass(frozen=True)
class Position:
    """Step, layer, head and query token.

    x, y: pixels from the left and from the top. frame: frame of tokens of the query; shown: frame of tokens to show.
    """

    step: int
    layer: str
    head: int
    x: int
    y: int
    frame: int = 0
    shown: int = 0


@dataclass(frozen=True)
class Inspection:
    """Attention of one query token, as numbers and as pictures (H, W, 3)."""

    processor: AcceleratedAttnProcessor
    layout: TokenLayout
    place: tuple[int, ...]
    attended: Attended
    picture: NDArray[np.uint8]
    dense: NDArray[np.uint8]
    other: NDArray[np.uint8]
    blocks: BlockMap | None

    @property
    def row(self) -> int:
        """Query block of the token."""
        assert self.blocks is not None
        token = self.layout.token(self.place) - self.layout.before
        return int(self.blocks.query_block[token])


def inspect_token(drawn: Drawn, position: Position, spec: AttentionSpec, device: torch.device) -> Inspection:
    """Inspect one query token under a mechanism.

    Raises: BadInput, ValueError, TypeError: a position or mechanism that does not fit the drawing.
    """
    call = drawn.call(position.step, position.layer)
    if not 0 <= position.head < call.n_heads:
        raise BadInput(f"This layer has {call.n_heads} heads: choose one of them, got head {position.head + 1}.")
    processor = _processor(drawn, spec, call.layout)
    place = _place(drawn, call.layout, position)
    one = call.head(position.head, device)
    found = attend(one, processor, call.layout.token(place))
    shown = min(position.shown * call.layout.grid[0] // drawn.token_frames, call.layout.grid[0] - 1)
    frame = drawn.frame(position.shown)
    at = place[-2:] if len(place) == 2 or place[0] == shown else None
    dense, weights, mask = (_of_frame(x.numpy(), shown) for x in (found.dense, found.weights, found.mask))
    top = float(np.quantile(np.concatenate([found.dense.flatten(), found.weights.flatten()]), _SHOWN_BRIGHTEST))
    return Inspection(
        processor, call.layout, place, found,
        picture=overlay(frame, np.zeros_like(dense), 1.0, None, at, grey_picture=False),
        dense=overlay(frame, dense, top, None, at), other=overlay(frame, weights, top, mask, at),
        blocks=block_map(one, processor),
    )  # fmt: skip


def _processor(drawn: Drawn, spec: AttentionSpec, layout: TokenLayout) -> AcceleratedAttnProcessor:
    if len(layout.grid) < 2:
        raise BadInput("The tokens of this layer do not form a 2-D or 3-D grid. Choose another layer.")
    check_fits(spec, drawn.call(drawn.recording.steps[0], drawn.layers[0]).layout.grid)
    return spec.processor(layout.grid)


def _place(drawn: Drawn, layout: TokenLayout, position: Position) -> tuple[int, ...]:
    """Coordinates on the layer's grid."""
    height, width = drawn.frames.shape[1:3]
    shares = [position.frame / drawn.token_frames, position.y / height, position.x / width][-len(layout.grid) :]
    return tuple(min(max(int(share * n), 0), n - 1) for share, n in zip(shares, layout.grid, strict=True))


def _of_frame(x: NDArray[Any], frame: int) -> NDArray[Any]:
    return x[frame] if x.ndim == 3 else x


def coverage_by_layer(
    drawn: Drawn, step: int, processor: AcceleratedAttnProcessor, device: torch.device, stop: Stop
) -> dict[str, Coverage]:
    """Share of dense attention that the mechanism covers in each layer; cached in ``drawn.shares``.

    Raises: Cancelled: ``stop`` was set.
    """
    shares = drawn.shares.setdefault((processor, step), {})
    for layer in drawn.layers:
        stop.check()
        if layer not in shares and (step, layer) in drawn.recording.calls:
            shares[layer] = coverage(drawn.recording, step, layer, processor, device)
    return shares
