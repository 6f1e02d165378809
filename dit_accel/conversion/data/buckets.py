"""Size buckets: the sizes that a conversion trains on, and the bucket of each picture or clip."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dit_accel.common.bundled import read_defaults
from dit_accel.comparison.sizes import Size, check_size, default_size, token_grid
from dit_accel.layout import TokenLayout
from dit_accel.mechanisms.attn_spec import AttentionSpec, ByLayer, short_options
from dit_accel.mechanisms.processor import AcceleratedAttnProcessor

from ..request import Source

__all__ = ["Bucket", "find_buckets", "frame_rate", "nearest", "processors_for"]


@dataclass(frozen=True)
class Bucket:
    """One training size.

    Attributes:
        size: height, width and, for clips, number of frames.
        call: arguments of the pipeline's call for this size, without the prompt.
        grid: the denoiser's token grid; None if it is not known.
    """

    size: Size
    call: dict[str, Any]
    grid: tuple[int, ...] | None


def find_buckets(source: Source, pipe: Any) -> list[Bucket]:
    """One bucket per size of the source; if it names none, one bucket of the pipeline's default size.

    Raises: ValueError: the pipeline cannot draw a size, or no size is known.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    common = {key: x for key, x in read_defaults(source.pipeline).items() if key in parameters}
    own = default_size(pipe) or Size(0, 0)
    name, clips = type(pipe).__name__, "num_frames" in parameters
    buckets: list[Bucket] = []
    for requested in source.sizes or (Size(source.height or 0, source.width or 0, source.frames),):
        if requested.frames and not clips:
            raise ValueError(f"{name} draws pictures, got a size of {requested.frames} frames: leave the frames out")
        size = Size(
            requested.height or common.get("height", own.height),
            requested.width or common.get("width", own.width),
            (requested.frames or common.get("num_frames", own.frames)) if clips else None,
        )
        if not size.height or not size.width:
            raise ValueError(f"{name} has no default size: give --height and --width")
        if clips and not size.frames:
            raise ValueError(f"{name} has no default number of frames: give --frames")
        check_size(pipe, size)
        call = {**common, "height": size.height, "width": size.width}
        if clips:
            call["num_frames"] = size.frames
        if size in [bucket.size for bucket in buckets]:
            raise ValueError(f"--size {size} is given twice")
        buckets.append(Bucket(size, call, token_grid(pipe, size)))
    return buckets


def frame_rate(source: Source, pipe: Any) -> float | None:
    """Frame rate of the clips: the source's, else that of ``defaults.json``, else the default of the pipeline's call.

    Returns: frames per second; None if none of them is set.
    Raises: ValueError: the rate in ``defaults.json`` is not a number above 0.
    """
    if source.fps is not None:
        return source.fps
    defaults = read_defaults(source.pipeline)
    parameter = inspect.signature(pipe.__call__).parameters.get("frame_rate")
    rate = defaults.get("fps", defaults.get("frame_rate", getattr(parameter, "default", None)))
    if rate is None or rate is inspect.Parameter.empty:
        return None
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
        raise ValueError(f"defaults.json in {source.pipeline}: fps must be a number above 0, got {rate!r}")
    return float(rate)


def nearest(buckets: Sequence[Bucket], height: int, width: int, frames: int | None = None) -> Bucket | None:
    """The bucket of the nearest aspect ratio.

    Ties are broken by the number of frames (longest first), then by area: the largest bucket that needs no upscaling,
    else the smallest.

    Args: frames: length of a clip; buckets with more frames are excluded. None for pictures.
    Returns: the bucket; None if the clip is too short for all of them.
    """

    def distance(bucket: Bucket) -> tuple[float, ...]:
        size = bucket.size
        stretch = abs(math.log(size.height * width / (size.width * height)))
        area, enlarged = size.height * size.width, size.height > height or size.width > width
        return (round(stretch, 6), -(size.frames or 0), enlarged, area if enlarged else -area)

    fits = [bucket for bucket in buckets if frames is None or (bucket.size.frames or 1) <= frames]
    return min(fits, key=distance, default=None)


def processors_for(attention: AttentionSpec, buckets: Sequence[Bucket], tell: Callable[[str], None]) -> ByLayer:
    """The processor of each group of layers, the same for all buckets.

    Args: tell: called with one line for each option that is capped because it exceeds a token grid.
    Raises: ValueError, TypeError: the default options differ between buckets, or options do not fit one of them.
    """
    made = [attention.processor(bucket.grid) for bucket in buckets]
    if any(processor != made[0] for processor in made):
        each = " or ".join(
            f"--attn {attention.name}:{short_options(x)} (for {b.size})" for x, b in zip(made, buckets, strict=True)
        )
        raise ValueError(
            f"the default options of {attention.name} depend on the token grid, and these sizes have different grids: "
            f"give all options, such as {each}"
        )
    choices = attention.by_layer(made[0])
    for layers, processor in choices:
        for bucket in buckets:
            for text in _capped_options(processor, bucket):
                where = "" if layers is None else f" in {layers}"
                tell(
                    f"{processor.name} on {bucket.size}{where}, {'×'.join(map(str, bucket.grid or ()))} tokens: {text}"
                )
    return choices


def _capped_options(processor: AcceleratedAttnProcessor, bucket: Bucket) -> list[str]:
    """One phrase for each option that is capped on this bucket's grid.

    Raises: ValueError: the options do not fit the grid.
    """
    if bucket.grid is None:
        return []
    layout = TokenLayout(bucket.grid)
    options = processor.layer_options(layout)
    try:
        fitted = processor.for_layout(layout).options()
    except ValueError as error:
        raise ValueError(f"{processor.name} does not fit {bucket.size}: {error}") from error
    return _changes(options, fitted)


def _changes(options: Mapping[str, Any], fitted: Mapping[str, Any]) -> list[str]:
    """Phrases such as "window 8x8 becomes 4x8"."""
    capped = []
    for key, value in fitted.items():
        requested = options.get(key, value)
        if isinstance(value, tuple) and not isinstance(requested, (tuple, list)):
            requested = (requested,) * len(value)
        if requested != value and not isinstance(requested, list):
            capped.append(f"{key} {_text(requested)} becomes {_text(value)}")
    return capped


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
