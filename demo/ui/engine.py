"""Pipelines of the app: loaded once, used by one request at a time, reset to dense attention after each."""

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

from dit_accel.common.bundled import IMAGE, OTHER_PROMPTS, VIDEO
from dit_accel.common.errors import BadInput
from dit_accel.common.pipeline_loading import load_pipeline
from dit_accel.comparison.calling import average_logit_fraction, default_call, to_frames
from dit_accel.comparison.sizes import Size
from dit_accel.comparison.step_timer import StepTimer
from dit_accel.install.installation import denoisers, reset_attn_processor

__all__ = ["Cancelled", "Drawing", "Engine", "Loaded", "Stop"]

_EMBEDDED = {"image": IMAGE, "video": VIDEO}
MAX_WAITING = 8
_POLL_SECONDS = 0.1
_DEFAULT_SIZE, _DEFAULT_STEPS = 512, 20  # for pipelines without defaults of their own


class Cancelled(Exception):
    """A request was stopped by the user."""


class Stop:
    """Stop flag of one request: set by another thread, checked by the request."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def check(self) -> None:
        """Raise Cancelled if the flag is set."""
        if self._event.is_set():
            raise Cancelled


@dataclass(frozen=True)
class Loaded:
    """A pipeline and the default arguments of its call."""

    kind: str  # "image" or "video"
    source: str  # folder or hub id
    pipe: Any
    size: Size
    steps: int
    call: dict[str, Any]  # arguments other than prompt, size, steps and seed
    prompts: tuple[str, ...]  # examples


@dataclass(frozen=True)
class Drawing:
    """A picture (one frame) or clip, with its time per step and fraction of computed logits."""

    frames: NDArray[np.uint8]  # (T, H, W, 3)
    seconds_per_step: float
    logit_fraction: float


class Engine:
    """Pipelines, request queue and temporary folder of the app. A context manager that removes the folder on exit.

    Args:
        pipeline: folder or hub id; None = the two embedded pipelines.
    Raises: BadInput: the pipeline cannot be loaded, or has no prompt argument; the embedded ones are not installed.
    """

    def __init__(self, pipeline: str | None, device: torch.device, dtype: torch.dtype) -> None:
        if pipeline is None:
            _ = IMAGE.folder  # raises before the page is served
        self.device, self.dtype = device, dtype
        self.folder = Path(tempfile.mkdtemp(prefix="dit-accel-"))
        self._loading = threading.Lock()
        self._waiting: deque[object] = deque()  # the first has the turn
        self._queue_changed = threading.Condition()
        self._loaded: dict[str, Loaded] = {}
        self._app_conversions: dict[str, dict[str, Path]] = {"image": {}, "video": {}}
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
        """Return the pipeline, loading it on first use. Read-only: to run it, take a :meth:`turn`.

        Raises: BadInput: no such kind, or the pipeline cannot be loaded.
        """
        if kind not in self.kinds:
            raise BadInput(f"there is no {kind} pipeline here; available: {', '.join(self.kinds)}")
        with self._loading:
            if kind not in self._loaded:
                embedded = _EMBEDDED[kind]
                self._loaded[kind] = _load(str(embedded.folder), self.dtype, self.device, embedded.prompts)
            return self._loaded[kind]

    @contextmanager
    def turn(
        self, kind: str, stop: Stop | None = None, on_wait: Callable[[int], None] | None = None
    ) -> Iterator[Loaded]:
        """Exclusive use of the pipelines inside the context, in order of arrival. Dense attention is restored on exit.

        Args:
            on_wait: called with the number of requests ahead of this one, whenever it changes.
        Raises:
            Cancelled: ``stop`` was set while the request was waiting.
            BadInput: too many requests are waiting.
        """
        ticket = object()
        with self._queue_changed:
            if len(self._waiting) > MAX_WAITING:
                raise BadInput(f"{MAX_WAITING} requests are already waiting. Try again in a minute.")
            self._waiting.append(ticket)
        try:
            self._wait_until_first(ticket, stop, on_wait)
            loaded = self.about(kind)
            try:
                yield loaded
            finally:
                reset_attn_processor(loaded.pipe)
        finally:
            with self._queue_changed:
                self._waiting.remove(ticket)
                self._queue_changed.notify_all()

    def _wait_until_first(self, ticket: object, stop: Stop | None, on_wait: Callable[[int], None] | None) -> None:
        reported = 0
        with self._queue_changed:
            while before := self._waiting.index(ticket):
                if stop is not None:
                    stop.check()
                if on_wait is not None and before != reported:
                    on_wait(reported := before)
                self._queue_changed.wait(_POLL_SECONDS)

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
        """Draw with the installed attention. Call it inside a :meth:`turn`.

        Args:
            on_step: called with the number of finished steps and the latents after each step.
        Raises:
            Cancelled: ``stop`` was set; the denoiser stops within a step.
            ValueError, TypeError: arguments that the pipeline rejects. ArithmeticError: NaN in the picture.
        """
        pipe, models = loaded.pipe, denoisers(loaded.pipe).values()
        sizes = {"height": size.height, "width": size.width}
        if size.frames is not None:
            sizes["num_frames"] = size.frames
        with _interruptible(models, stop), StepTimer(models, self.device) as timer:
            output = pipe(
                prompt=prompt, num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(seed),
                output_type="np", **sizes, **loaded.call, **_callback(pipe, stop, on_step),
            )  # fmt: skip
        stop.check()
        return Drawing(to_frames(output), timer.seconds_per_step(steps), average_logit_fraction(pipe, steps))

    def conversions(self, kind: str) -> dict[str, Path]:
        """Sources for ``load_attention`` by label: conversions of the embedded pipeline and those made in the app."""
        own = _EMBEDDED[kind].conversions if self._embedded else None
        folders = sorted(own.iterdir()) if own is not None and own.is_dir() else []
        return {
            f"{folder.name.upper()}, trained": folder for folder in folders if folder.is_dir()
        } | self._app_conversions[kind]

    def add_conversion(self, kind: str, label: str, folder: Path) -> None:
        """Register a conversion made in the app."""
        self._app_conversions[kind] = {**self._app_conversions[kind], label: folder}


def _load(source: str, dtype: torch.dtype, device: torch.device, prompts: tuple[str, ...]) -> Loaded:
    pipe = load_pipeline(source, dtype, device)
    try:
        denoisers(pipe)
        own = default_call(pipe, source)
    except ValueError as error:
        raise BadInput(str(error)) from error
    kind = "video" if "num_frames" in inspect.signature(pipe.__call__).parameters else "image"
    size = Size(own.size.height or _DEFAULT_SIZE, own.size.width or _DEFAULT_SIZE, own.size.frames)
    return Loaded(kind, source, pipe, size, own.steps or _DEFAULT_STEPS, own.arguments, prompts)


def _callback(pipe: Any, stop: Stop, on_step: Callable[[int, Any], None] | None) -> dict[str, Any]:
    """Callback argument of the pipeline's call; empty for pipelines without step callbacks."""
    if "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
        return {}

    def report(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        stop.check()
        if on_step is not None:
            on_step(step + 1, tensors["latents"])
        return tensors

    return {"callback_on_step_end": report}


@contextmanager
def _interruptible(models: Any, stop: Stop) -> Iterator[None]:
    """Raise Cancelled at the denoiser's next attention layer once ``stop`` is set."""
    modules = [module for model in models for module in (model, *model.modules()) if hasattr(module, "processor")]
    handles = [module.register_forward_pre_hook(lambda *_: stop.check()) for module in (*models, *modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
