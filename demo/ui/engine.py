"""The app's pipelines: loaded once, used by one request at a time, and left dense after each."""

from __future__ import annotations

import inspect
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_accel.bundled import IMAGE, OTHER_PROMPTS, VIDEO
from dit_accel.compare.calling import average_logit_fraction, default_call, to_frames
from dit_accel.compare.sizes import Size
from dit_accel.compare.step_timer import StepTimer
from dit_accel.errors import BadInput
from dit_accel.install import denoisers, reset_attn_processor
from dit_accel.pipeline_loading import load_pipeline

__all__ = ["Cancelled", "Drawing", "Engine", "Loaded", "Stop"]

_EMBEDDED = {"image": IMAGE, "video": VIDEO}
MOST_WAITING = 8
_POLL_SECONDS = 0.1
_USUAL_SIZE, _USUAL_STEPS = 512, 20  # for pipelines that do not say


class Cancelled(Exception):
    """The person asked to stop."""


class Stop:
    """One a running request: set by whoever wants it to end, checked by what runs."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def check(self) -> None:
        """Raises: Cancelled: it was set."""
        if self._event.is_set():
            raise Cancelled


@dataclass(frozen=True)
class Loaded:
    """A pipeline and what it is called with when nothing else is asked for."""

    kind: str  # "image" or "video"
    source: str  # folder or hub id
    pipe: Any
    size: Size
    steps: int
    call: dict[str, Any]  # all arguments but prompt, size, steps and seed
    prompts: tuple[str, ...]  # examples


@dataclass(frozen=True)
class Drawing:
    """A picture (one frame) or clip, and what it cost."""

    frames: NDArray[np.uint8]  # (T, H, W, 3)
    seconds_per_step: float
    logit_fraction: float


class Engine:
    """Pipelines, turns and the app's own temporary folder. A context manager: the folder is gone afterwards.

    Args:
        pipeline: folder or hub id; None = the two embedded pipelines.
    Raises: BadInput: the pipeline cannot be loaded, or takes no prompt.
    """

    def __init__(self, pipeline: str | None, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.folder = Path(tempfile.mkdtemp(prefix="dit-accel-"))
        self._loading = threading.Lock()
        self._waiting: deque[object] = deque()  # whose turn it is stands first
        self._moved = threading.Condition()
        self._loaded: dict[str, Loaded] = {}
        self._made: dict[str, dict[str, Path]] = {"image": {}, "video": {}}
        self.kinds: tuple[str, ...] = ("image", "video")
        if pipeline is not None:
            try:
                loaded = _load(pipeline, dtype, device, OTHER_PROMPTS)
            except BaseException:
                self.close()
                raise
            self._loaded[loaded.kind] = loaded
            self.kinds = (loaded.kind,)
        self._embedded = pipeline is None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def about(self, kind: str) -> Loaded:
        """The pipeline, loaded if it is not yet. Only for reading: what uses it takes a :meth:`turn`.

        Raises: BadInput: no such kind, or it cannot be loaded.
        """
        if kind not in self.kinds:
            raise BadInput(f"there is no {kind} pipeline here; there is: {', '.join(self.kinds)}")
        with self._loading:
            if kind not in self._loaded:
                embedded = _EMBEDDED[kind]
                self._loaded[kind] = _load(str(embedded.folder), self.dtype, self.device, embedded.prompts)
            return self._loaded[kind]

    @contextmanager
    def turn(
        self, kind: str, stop: Stop | None = None, on_wait: Callable[[int], None] | None = None
    ) -> Iterator[Loaded]:
        """Inside, nobody else uses a pipeline: first come, first served. Afterwards it is dense, whatever happened.

        Args:
            on_wait: called with the number of requests before this one, whenever it changes.
        Raises:
            Cancelled: ``stop`` was set while others had their turn.
            BadInput: too many wait already.
        """
        me = object()
        with self._moved:
            if len(self._waiting) > MOST_WAITING:
                raise BadInput(f"{MOST_WAITING} requests wait already. Try again in a minute.")
            self._waiting.append(me)
        try:
            self._wait_until_first(me, stop, on_wait)
            loaded = self.about(kind)
            try:
                yield loaded
            finally:
                reset_attn_processor(loaded.pipe)
        finally:
            with self._moved:
                self._waiting.remove(me)
                self._moved.notify_all()

    def _wait_until_first(self, me: object, stop: Stop | None, on_wait: Callable[[int], None] | None) -> None:
        told = 0
        with self._moved:
            while before := self._waiting.index(me):
                if stop is not None:
                    stop.check()
                if on_wait is not None and before != told:
                    on_wait(told := before)
                self._moved.wait(_POLL_SECONDS)

    def draw(
        self,
        loaded: Loaded,
        prompt: str,
        seed: int,
        size: Size,
        steps: int,
        stop: Stop,
        on_step: Callable[[int, Any], None] | None = None,
    ) -> Drawing:
        """Draw with the attention that is installed, inside a :meth:`turn`.

        Args:
            on_step: called with the number of finished steps and the latents after each step.
        Raises:
            Cancelled: ``stop`` was set; the denoiser ends within a step.
            ValueError, TypeError: something that the pipeline cannot draw. ArithmeticError: NaN in the picture.
        """
        pipe, models = loaded.pipe, denoisers(loaded.pipe).values()
        sizes = {"height": size.height, "width": size.width}
        if size.frames is not None:
            sizes["num_frames"] = size.frames
        with _stoppable(models, stop), StepTimer(models, self.device) as timer:
            output = pipe(
                prompt=prompt, num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(seed),
                output_type="np", **sizes, **loaded.call, **_callback(pipe, stop, on_step),
            )  # fmt: skip
        stop.check()
        return Drawing(to_frames(output), timer.seconds_per_step(steps), average_logit_fraction(pipe, steps))

    def conversions(self, kind: str) -> dict[str, Path]:
        """What ``load_attention`` takes, by label: the embedded pipeline's conversions and those made in the app."""
        own = _EMBEDDED[kind].conversions if self._embedded else None
        folders = sorted(own.iterdir()) if own is not None and own.is_dir() else []
        return {f"{folder.name.upper()}, trained": folder for folder in folders if folder.is_dir()} | self._made[kind]

    def add_conversion(self, kind: str, label: str, folder: Path) -> None:
        """Let a conversion that was made in the app be chosen."""
        self._made[kind] = {**self._made[kind], label: folder}


def _load(source: str, dtype: torch.dtype, device: torch.device, prompts: tuple[str, ...]) -> Loaded:
    pipe = load_pipeline(source, dtype, device)
    try:
        denoisers(pipe)
        own = default_call(pipe, source)
    except ValueError as error:
        raise BadInput(str(error)) from error
    kind = "video" if "num_frames" in inspect.signature(pipe.__call__).parameters else "image"
    size = Size(own.size.height or _USUAL_SIZE, own.size.width or _USUAL_SIZE, own.size.frames)
    return Loaded(kind, source, pipe, size, own.steps or _USUAL_STEPS, own.arguments, prompts)


def _callback(pipe: Any, stop: Stop, on_step: Callable[[int, Any], None] | None) -> dict[str, Any]:
    """The argument that makes a pipeline report its steps; none for pipelines that report none."""
    if "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
        return {}

    def report(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        stop.check()
        if on_step is not None:
            on_step(step + 1, tensors["latents"])
        return tensors

    return {"callback_on_step_end": report}


@contextmanager
def _stoppable(models: Any, stop: Stop) -> Iterator[None]:
    """Inside, a denoiser ends at its next attention layer once ``stop`` is set."""
    places = [place for model in models for place in (model, *model.modules()) if hasattr(place, "processor")]
    handles = [place.register_forward_pre_hook(lambda *_: stop.check()) for place in (*models, *places)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
