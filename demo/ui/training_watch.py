"""What a page is told of a conversion while it goes on: losses, distance to the teacher, pictures."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dit_accel.convert.noise import NoiseProcess
from dit_accel.convert.samples import Samples
from dit_accel.convert.watch import Watch
from dit_accel.files import write_json

from .engine import Cancelled, Stop

__all__ = ["Asked", "Distance", "Drawn", "Preparing", "Step", "TrainingWatch"]

_DISTANCES = 8  # are measured, and one before
_LEVELS = (0.125, 0.375, 0.625, 0.875)  # of noise, as dit-accel evaluate takes them
_FRAMES = 4  # of a clip, as convert's pictures have them


@dataclass(frozen=True)
class Preparing:
    """So many samples are there, of how many."""

    done: int
    total: int | None


@dataclass(frozen=True)
class Step:
    """history: the losses of all steps so far."""

    step: int
    steps: int
    history: Sequence[Mapping[str, float]]
    seconds_left: float | None


@dataclass(frozen=True)
class Distance:
    """How far the student's predictions are from the dense pipeline's: squared, over the square of the latter, mean
    over a few noisy samples that stay the same."""

    step: int
    value: float


@dataclass(frozen=True)
class Drawn:
    """The teacher's picture and the student's of the same prompt and seed; four frames of a clip as one picture."""

    step: int
    teacher: NDArray[np.uint8]  # (H, W, 3)
    student: NDArray[np.uint8]


class Asked(KeyboardInterrupt):
    """As the machinery is stopped by a signal, so here by a person's request."""


class TrainingWatch(Watch):
    """Tells the page."""

    def __init__(self, steps: int, folder: Path, stop: Stop, tell: Callable[[Any], None]) -> None:
        self.steps, self.folder, self.stop, self.tell = steps, folder, stop, tell
        self.done = self.first = 0
        self.began: float | None = None
        self.history: list[Mapping[str, float]] = []
        self.distances: dict[str, float] = {}
        self.probe: _Probe | None = None

    @property
    def new_steps(self) -> int:
        return self.done - self.first

    def check(self) -> None:
        try:
            self.stop.check()
        except Cancelled:
            raise Asked from None

    def sample(self, made: int, total: int | None) -> None:
        self.check()
        self.tell(Preparing(made, total))

    def ready(self, model: nn.Module, process: NoiseProcess, samples: Samples) -> None:
        self.probe = _Probe(model, process, samples)

    def begin(self, step: int, history: Sequence[Mapping[str, float]]) -> None:
        """What was done before is told again: the page may be another."""
        self.done, self.first, self.history = step, step, list(history)
        self.tell(Step(step, self.steps, tuple(self.history), None))
        self._tell_earlier()
        if step == 0:
            self._measure()
        self.began = time.monotonic()

    def picture(self, step: int, path: Path) -> None:
        if path.stem.endswith("-0"):  # of the first prompt
            self.tell(_drawn(step, path))
        if step == 0:
            self.began = time.monotonic()

    def step(self, step: int, losses: Mapping[str, float]) -> None:
        self.done = step
        self.history.append(losses)
        if step % max(1, self.steps // _DISTANCES) == 0 or step == self.steps:
            self._measure()
        assert self.began is not None
        each = (time.monotonic() - self.began) / (step - self.first)
        self.tell(Step(step, self.steps, tuple(self.history), each * (self.steps - step)))
        self.check()

    def _measure(self) -> None:
        assert self.probe is not None
        value = self.probe.measure()
        if not math.isfinite(value):  # so will be the next loss, which ends it
            return
        self.distances[str(self.done)] = value
        write_json(self.folder / "distances.json", self.distances)
        self.tell(Distance(self.done, value))

    def _tell_earlier(self) -> None:
        """Of an earlier run: distances, the first picture, and the last."""
        file = self.folder / "distances.json"
        told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.distances = {step: value for step, value in told.items() if int(step) <= self.done}
        for at, value in self.distances.items():
            self.tell(Distance(int(at), value))
        drawn = {_step_of(path): path for path in sorted(self.folder.glob("pictures/step-*-0.png"))}
        earlier = [step for step in drawn if step <= self.done] if self.done else []
        for step in dict.fromkeys((*earlier[:1], *earlier[-1:])):
            self.tell(_drawn(step, drawn[step]))


class _Probe:
    """A few noisy samples and what the teacher predicts for them."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, process: NoiseProcess, samples: Samples) -> None:
        self.model, device = model, next(model.parameters()).device
        self.cases: list[tuple[dict[str, Any], Tensor]] = []
        for i, level in enumerate(_LEVELS):
            sample = samples[i % len(samples)]
            sample.conditions.tensors = {key: x.to(device) for key, x in sample.conditions.tensors.items()}
            noise = torch.randn(sample.latents.shape, generator=torch.Generator().manual_seed(i))
            at = torch.tensor([level], device=device)
            noisy, _ = process.mix(sample.latents.to(device), noise.to(device), at)
            arguments = sample.conditions.arguments(noisy, process.timestep(at))
            self.cases.append((arguments, model(**arguments)[0].float()))

    @torch.no_grad()
    def measure(self) -> float:
        trains = self.model.training
        self.model.eval()
        try:
            found = [self.model(**arguments)[0].float() for arguments, _ in self.cases]
        finally:
            self.model.train(trains)
        shares = [(x - y).square().sum() / y.square().sum() for x, (_, y) in zip(found, self.cases, strict=True)]
        return float(torch.stack(shares).mean())


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def _drawn(step: int, path: Path) -> Drawn:
    with Image.open(path) as picture:
        both = np.asarray(picture.convert("RGB"))
    half = both.shape[1] // 2
    return Drawn(step, _sheet(both[:, :half]), _sheet(both[:, half:]))


def _sheet(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Four frames beside one another as two rows; a picture stays as it is."""
    height, width = frames.shape[:2]
    if width % _FRAMES or width < 3 * height:
        return frames
    first, second = frames[:, : width // 2], frames[:, width // 2 :]
    return np.concatenate([first, second])
