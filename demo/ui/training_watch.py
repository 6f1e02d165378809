"""Progress events of a running conversion: losses, distance to the teacher, pictures."""

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

from dit_accel.common.files import write_json
from dit_accel.conversion.data.samples import Samples
from dit_accel.conversion.recipes.noise import NoiseProcess
from dit_accel.conversion.watch import Watch

from .engine import Cancelled, Stop

__all__ = ["Distance", "Drawn", "Preparing", "Step", "StopRequested", "TrainingWatch"]

_DISTANCES = 8  # measurements during training, and one before
_LEVELS = (0.125, 0.375, 0.625, 0.875)  # noise levels, as in dit-accel evaluate
_FRAMES = 4  # frames of a clip in a picture of dit-accel convert


@dataclass(frozen=True)
class Preparing:
    """Number of prepared samples, and of all samples if known."""

    done: int
    total: int | None


@dataclass(frozen=True)
class Step:
    """Progress of training. history: losses of all steps so far."""

    step: int
    steps: int
    history: Sequence[Mapping[str, float]]
    seconds_left: float | None


@dataclass(frozen=True)
class Distance:
    """Squared error of the student's predictions, relative to the squared norm of the dense pipeline's.

    Mean over a few fixed noisy samples.
    """

    step: int
    value: float


@dataclass(frozen=True)
class Drawn:
    """Pictures of the teacher and the student for the same prompt and seed; of a clip, four frames as one picture."""

    step: int
    teacher: NDArray[np.uint8]  # (H, W, 3)
    student: NDArray[np.uint8]


class StopRequested(KeyboardInterrupt):
    """Stop requested by the user. The training loop handles it like an interrupt signal."""


class TrainingWatch(Watch):
    """Watch that reports progress events to the page."""

    def __init__(self, steps: int, folder: Path, stop: Stop, report: Callable[[Any], None]) -> None:
        self.steps, self.folder, self.stop, self.report = steps, folder, stop, report
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
            raise StopRequested from None

    def sample(self, made: int, total: int | None) -> None:
        self.check()
        self.report(Preparing(made, total))

    def ready(self, model: nn.Module, process: NoiseProcess, samples: Samples) -> None:
        self.probe = _Probe(model, process, samples)

    def begin(self, step: int, history: Sequence[Mapping[str, float]]) -> None:
        """Report the earlier steps of a resumed run again, because another page may have started it."""
        self.done, self.first, self.history = step, step, list(history)
        self.report(Step(step, self.steps, tuple(self.history), None))
        self._report_earlier()
        if step == 0:
            self._measure()
        self.began = time.monotonic()

    def picture(self, step: int, path: Path) -> None:
        if path.stem.endswith("-0"):  # first prompt
            self.report(_drawn(step, path))
        if step == 0:
            self.began = time.monotonic()

    def step(self, step: int, losses: Mapping[str, float]) -> None:
        self.done = step
        self.history.append(losses)
        if step % max(1, self.steps // _DISTANCES) == 0 or step == self.steps:
            self._measure()
        assert self.began is not None
        each = (time.monotonic() - self.began) / (step - self.first)
        self.report(Step(step, self.steps, tuple(self.history), each * (self.steps - step)))
        self.check()

    def _measure(self) -> None:
        assert self.probe is not None
        value = self.probe.measure()
        if not math.isfinite(value):  # the next loss will not be finite either, which ends the run
            return
        self.distances[str(self.done)] = value
        write_json(self.folder / "distances.json", self.distances)
        self.report(Distance(self.done, value))

    def _report_earlier(self) -> None:
        """Report the distances, the first picture and the last picture of an earlier run."""
        file = self.folder / "distances.json"
        saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.distances = {step: value for step, value in saved.items() if int(step) <= self.done}
        for at, value in self.distances.items():
            self.report(Distance(int(at), value))
        drawn = {_step_of(path): path for path in sorted(self.folder.glob("pictures/step-*-0.png"))}
        earlier = [step for step in drawn if step <= self.done] if self.done else []
        for step in dict.fromkeys((*earlier[:1], *earlier[-1:])):
            self.report(_drawn(step, drawn[step]))


class _Probe:
    """A few noisy samples and the teacher's predictions for them."""

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
        """Return the distance of the student's predictions to the teacher's."""
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
    """Rearrange four frames in one row into two rows; a picture is returned unchanged."""
    height, width = frames.shape[:2]
    if width % _FRAMES or width < 3 * height:
        return frames
    first, second = frames[:, : width // 2], frames[:, width // 2 :]
    return np.concatenate([first, second])
