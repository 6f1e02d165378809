"""Default call arguments and output of a pipeline, for ``dit-accel compare`` and the demo."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.bundled import read_defaults
from ..install.describe import logit_fraction
from ..install.installation import denoisers, installed_layers
from .sizes import Size, default_size

__all__ = ["DefaultCall", "average_logit_fraction", "default_call", "to_frames"]


@dataclass(frozen=True)
class DefaultCall:
    """Default arguments of a pipeline call. A side of 0 and None mean that the pipeline has no default.

    ``arguments``: all except prompt, size, steps and seed.
    """

    size: Size
    steps: int | None
    arguments: dict[str, Any]


def default_call(pipe: Any, source: str) -> DefaultCall:
    """Default call arguments: those in ``defaults.json`` of the pipeline's folder, else those of the pipeline class.

    Raises: ValueError: the pipeline takes no prompt, or does not accept an argument in ``defaults.json``.
    """
    name = type(pipe).__name__
    parameters = inspect.signature(pipe.__call__).parameters
    if "prompt" not in parameters:
        raise ValueError(f"{name} takes no prompt; give a text-to-image or text-to-video pipeline")
    given = read_defaults(source)
    unknown = [key for key in given if key not in parameters]
    if unknown:
        raise ValueError(f"defaults.json in {source} has {', '.join(unknown)}, which {name} does not take")
    own = default_size(pipe) or Size(0, 0)
    size = Size(given.pop("height", own.height), given.pop("width", own.width), given.pop("num_frames", own.frames))
    steps = given.pop("num_inference_steps", None)
    if steps is None and "num_inference_steps" in parameters:
        steps = parameters["num_inference_steps"].default
    return DefaultCall(size, steps if isinstance(steps, int) and steps >= 1 else None, given)


def to_frames(output: Any) -> NDArray[np.uint8]:
    """Convert a pipeline's output with ``output_type="np"`` to (T, H, W, 3) uint8 frames.

    Raises: ArithmeticError: the output contains NaN or infinity.
    """
    values = np.asarray((output.images if hasattr(output, "images") else output.frames)[0], dtype=np.float32)
    if not np.isfinite(values).all():
        raise ArithmeticError("the picture contains NaN or infinity")
    values = values if values.ndim == 4 else values[None]
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def average_logit_fraction(pipe: Any, steps: int) -> float:
    """Mean :func:`logit_fraction` over all steps of the last picture, including dense steps."""
    layers = [layer for model in denoisers(pipe).values() for layer in installed_layers(model).values()]
    dense = min(steps, max((layer.mechanism.dense_steps for layer in layers), default=0))
    return (dense + logit_fraction(pipe) * (steps - dense)) / steps
