"""How a pipeline is called, and what comes out of it: shared by the command and the app."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundled import read_defaults
from ..describe import logit_fraction
from ..install import denoisers, installed_layers
from .sizes import Size, default_size

__all__ = ["OwnCall", "average_logit_fraction", "own_call", "to_frames"]


@dataclass(frozen=True)
class OwnCall:
    """What a pipeline is called with when nothing else is asked for. 0 and None: it does not say.

    ``arguments``: all but prompt, size, steps and seed."""

    size: Size
    steps: int | None
    arguments: dict[str, Any]


def own_call(pipe: Any, source: str) -> OwnCall:
    """From ``defaults.json`` in the pipeline's folder, else the pipeline's own.

    Raises: ValueError: it takes no prompt, or not what its ``defaults.json`` says.
    """
    name = type(pipe).__name__
    parameters = inspect.signature(pipe.__call__).parameters
    if "prompt" not in parameters:
        raise ValueError(f"{name} takes no prompt; give a text-to-image or text-to-video pipeline")
    told = read_defaults(source)
    unknown = [key for key in told if key not in parameters]
    if unknown:
        raise ValueError(f"defaults.json in {source} has {', '.join(unknown)}, which {name} does not take")
    own = default_size(pipe) or Size(0, 0)
    size = Size(told.pop("height", own.height), told.pop("width", own.width), told.pop("num_frames", own.frames))
    steps = told.pop("num_inference_steps", None)
    if steps is None and "num_inference_steps" in parameters:
        steps = parameters["num_inference_steps"].default
    return OwnCall(size, steps if isinstance(steps, int) and steps >= 1 else None, told)


def to_frames(output: Any) -> NDArray[np.uint8]:
    """(T, H, W, 3) 8-bit frames of a pipeline's output of ``output_type="np"``.

    Raises: ArithmeticError: NaN or infinity.
    """
    values = np.asarray((output.images if hasattr(output, "images") else output.frames)[0], dtype=np.float32)
    if not np.isfinite(values).all():
        raise ArithmeticError("the picture holds NaN or infinity")
    values = values if values.ndim == 4 else values[None]
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def average_logit_fraction(pipe: Any, steps: int) -> float:
    """:func:`logit_fraction` over all the steps of the last picture, those that stayed dense included."""
    layers = [layer for model in denoisers(pipe).values() for layer in installed_layers(model).values()]
    dense = min(steps, max((layer.mechanism.dense_steps for layer in layers), default=0))
    return (dense + logit_fraction(pipe) * (steps - dense)) / steps
