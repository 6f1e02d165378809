"""Drawings whose attention can be looked into: kept for each open page, and looked at place by place."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_accel.attn_spec import AttentionSpec
from dit_accel.errors import BadInput
from dit_accel.layout import TokenLayout
from dit_accel.processor import AcceleratedAttnProcessor

from .attention_maps import (
    Attended,
    AttentionCall,
    BlockMap,
    Caught,
    Recording,
    attend,
    block_map,
    caught,
    recording,
    spread_steps,
)
from .controls import Wanted, check_fits
from .engine import Engine, Loaded, Stop
from .plots import overlay
from .preview import Preview

__all__ = ["Drawings", "Drawn", "Look", "Step", "Where", "catch", "draw", "look"]

_STEPS_BETWEEN_PREVIEWS = 2
_SHOWN_BRIGHTEST = 0.999  # this quantile of the weights is shown brightest: a few larger ones do not dim the rest


@dataclass
class Drawn:
    """A dense drawing and its attention calls. ``shares``: what was found of whole layers, by (processor, step)."""

    wanted: Wanted
    frames: NDArray[np.uint8]  # (F, H, W, 3)
    kept: Recording
    shares: dict[tuple[AcceleratedAttnProcessor, int], dict[str, Caught]] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        return self.frames.nbytes + self.kept.n_bytes

    @property
    def layers(self) -> list[str]:
        return [layer for layer in self.kept.layers if (self.kept.steps[0], layer) in self.kept.calls]

    def call(self, step: int, layer: str) -> AttentionCall:
        """Raises: BadInput: it was not kept."""
        if (step, layer) not in self.kept.calls:
            raise BadInput("This layer and step were not kept of the drawing: choose others, or draw again.")
        return self.kept.calls[step, layer]

    @property
    def token_frames(self) -> int:
        grid = self.call(self.kept.steps[0], self.layers[0]).layout.grid
        return grid[0] if len(grid) == 3 else 1

    def frame(self, token_frame: int) -> NDArray[np.uint8]:
        """(H, W, 3) of the clip where the tokens of this frame stand."""
        last = len(self.frames) - 1
        return self.frames[round(token_frame * last / max(1, self.token_frames - 1))]


class Drawings:
    """The last drawing of each open page; the oldest go when there are too many."""

    def __init__(self, most_bytes: int = 1 << 30) -> None:
        self.most_bytes = most_bytes
        self._of_page: OrderedDict[str, Drawn] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, page: str, drawn: Drawn) -> None:
        with self._lock:
            self._of_page.pop(page, None)
            self._of_page[page] = drawn
            while len(self._of_page) > 1 and sum(x.n_bytes for x in self._of_page.values()) > self.most_bytes:
                self._of_page.popitem(last=False)

    def get(self, page: str) -> Drawn:
        """Raises: BadInput: the page has none, or no longer."""
        with self._lock:
            if page not in self._of_page:
                raise BadInput("There is no drawing to look into, or no longer: press Draw.")
            self._of_page.move_to_end(page)
            return self._of_page[page]

    def drop(self, page: str) -> None:
        """Free what a page has kept, if anything."""
        with self._lock:
            self._of_page.pop(page, None)


@dataclass(frozen=True)
class Step:
    """News of a drawing."""

    step: int
    steps: int
    picture: NDArray[np.uint8] | None = None


def draw(engine: Engine, wanted: Wanted, stop: Stop, tell: Callable[[Any], None]) -> None:
    """Draw densely; tells the number of requests that come first, Steps, and at last what was Drawn.

    Raises: what ``Engine.draw`` raises.
    """
    with engine.turn(wanted.kind, stop, tell) as loaded, recording(loaded.pipe, spread_steps(wanted.steps)) as kept:
        on_step = _teller(loaded, wanted, tell)
        drawing = engine.draw(loaded, wanted.prompt, wanted.seed, wanted.size, wanted.steps, stop, on_step)
    if not kept.calls:
        raise BadInput("Nothing of this pipeline's attention could be kept: a single layer takes too much memory.")
    tell(Drawn(wanted, drawing.frames, kept))


def _teller(loaded: Loaded, wanted: Wanted, tell: Callable[[Any], None]) -> Callable[[int, Any], None]:
    preview = Preview(loaded.pipe, wanted.size)

    def on_step(step: int, latents: Any) -> None:
        preview.see(step, latents)
        due = step % _STEPS_BETWEEN_PREVIEWS == 0 and step < wanted.steps
        tell(Step(step, wanted.steps, preview.picture() if due else None))

    return on_step


@dataclass(frozen=True)
class Where:
    """x, y: pixels from the left and the top; frame: the token frame that the place is in; shown: the one to show."""

    step: int
    layer: str
    head: int
    x: int
    y: int
    frame: int = 0
    shown: int = 0


@dataclass(frozen=True)
class Look:
    """What one place attends to, as pictures (H, W, 3) and in figures."""

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
        """The query block of the place."""
        assert self.blocks is not None
        token = self.layout.token(self.place) - self.layout.before
        return int(self.blocks.query_block[token])


def look(drawn: Drawn, where: Where, spec: AttentionSpec, device: torch.device) -> Look:
    """Raises: BadInput, ValueError, TypeError: a place or mechanism that the drawing does not have."""
    call = drawn.call(where.step, where.layer)
    if not 0 <= where.head < call.n_heads:
        raise BadInput(f"This layer has {call.n_heads} heads.")
    processor = _processor(drawn, spec, call.layout)
    place = _place(drawn, call.layout, where)
    one = call.head(where.head, device)
    found = attend(one, processor, call.layout.token(place))
    shown = min(where.shown * call.layout.grid[0] // drawn.token_frames, call.layout.grid[0] - 1)
    frame = drawn.frame(where.shown)
    at = place[-2:] if len(place) == 2 or place[0] == shown else None
    dense, weights, seen = (_of_frame(x.numpy(), shown) for x in (found.dense, found.weights, found.seen))
    top = float(np.quantile(np.concatenate([found.dense.flatten(), found.weights.flatten()]), _SHOWN_BRIGHTEST))
    return Look(
        processor, call.layout, place, found,
        picture=overlay(frame, np.zeros_like(dense), 1.0, None, at, faint=False),
        dense=overlay(frame, dense, top, None, at), other=overlay(frame, weights, top, seen, at),
        blocks=block_map(one, processor),
    )  # fmt: skip


def _processor(drawn: Drawn, spec: AttentionSpec, layout: TokenLayout) -> AcceleratedAttnProcessor:
    if len(layout.grid) < 2:
        raise BadInput("The tokens of this layer do not lie on a picture.")
    check_fits(spec, drawn.call(drawn.kept.steps[0], drawn.layers[0]).layout.grid)
    return spec.processor(layout.grid)


def _place(drawn: Drawn, layout: TokenLayout, where: Where) -> tuple[int, ...]:
    """Coordinates on the layer's grid."""
    height, width = drawn.frames.shape[1:3]
    shares = [where.frame / drawn.token_frames, where.y / height, where.x / width][-len(layout.grid) :]
    return tuple(min(max(int(share * n), 0), n - 1) for share, n in zip(shares, layout.grid, strict=True))


def _of_frame(x: NDArray[Any], frame: int) -> NDArray[Any]:
    return x[frame] if x.ndim == 3 else x


def catch(
    drawn: Drawn, step: int, processor: AcceleratedAttnProcessor, device: torch.device, stop: Stop
) -> dict[str, Caught]:
    """How much of dense attention the mechanism catches in each layer; found once.

    Raises: Cancelled: ``stop`` was set.
    """
    shares = drawn.shares.setdefault((processor, step), {})
    for layer in drawn.layers:
        stop.check()
        if layer not in shares and (step, layer) in drawn.kept.calls:
            shares[layer] = caught(drawn.kept, step, layer, processor, device)
    return shares
