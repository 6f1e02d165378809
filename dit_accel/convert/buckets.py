"""Sizes that a conversion trains on, and which of them a picture or clip goes to."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..attn_spec import AttentionSpec, ByLayer, short_options
from ..bundled import read_defaults
from ..compare.sizes import Size, check_size, default_size, token_grid
from ..layout import TokenLayout
from ..processor import AcceleratedAttnProcessor
from .request import Source

__all__ = ["Bucket", "find_buckets", "frame_rate", "nearest", "parse_size", "processors_for"]


@dataclass(frozen=True)
class Bucket:
    """A size, what the pipeline is called with for it but for the prompt, and the token grid (None: not known)."""

    size: Size
    call: dict[str, Any]
    grid: tuple[int, ...] | None


def parse_size(text: str) -> Size:
    """``512x768`` (height and width) or ``480x832x81`` (and frames).

    Raises: ValueError: anything else.
    """
    found = re.fullmatch(r"(\d+)[x×](\d+)(?:[x×](\d+))?", text.strip().lower())
    lengths = [int(part) for part in found.groups() if part] if found else [0]
    if 0 in lengths:
        raise ValueError(f"--size takes HEIGHTxWIDTH, for clips HEIGHTxWIDTHxFRAMES, such as 480x832x81, got {text!r}")
    return Size(*lengths)


def find_buckets(source: Source, pipe: Any) -> list[Bucket]:
    """A bucket for each size of the source; where it has none, one of the size that the pipeline draws by default.

    Raises: ValueError: a size that the pipeline cannot draw, or none is known.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    common = {key: x for key, x in read_defaults(source.pipeline).items() if key in parameters}
    own = default_size(pipe) or Size(0, 0)
    name, clips = type(pipe).__name__, "num_frames" in parameters
    buckets: list[Bucket] = []
    for asked in source.sizes or (Size(source.height or 0, source.width or 0, source.frames),):
        if asked.frames and not clips:
            raise ValueError(f"{name} draws pictures: {asked.frames} frames are for clips")
        size = Size(
            asked.height or common.get("height", own.height),
            asked.width or common.get("width", own.width),
            (asked.frames or common.get("num_frames", own.frames)) if clips else None,
        )
        if not size.height or not size.width:
            raise ValueError(f"{name} does not say what size it draws; give --height and --width")
        if clips and not size.frames:
            raise ValueError(f"{name} does not say how many frames it draws; give --frames")
        check_size(pipe, size)
        call = {**common, "height": size.height, "width": size.width}
        if clips:
            call["num_frames"] = size.frames
        if size in [bucket.size for bucket in buckets]:
            raise ValueError(f"--size {size} is given twice")
        buckets.append(Bucket(size, call, token_grid(pipe, size)))
    return buckets


def frame_rate(source: Source, pipe: Any) -> float | None:
    """Frames a second of the clips: asked for, of the pipeline's defaults, or of its call; None: it does not say.

    Raises: ValueError: the pipeline's defaults have one that is no rate.
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
    """The bucket whose proportions are nearest; of several such the longest, then the largest that needs no enlarging,
    else the smallest. frames: of a clip, which goes only where it has enough of them; None: nowhere."""

    def distance(bucket: Bucket) -> tuple[float, ...]:
        size = bucket.size
        stretch = abs(math.log(size.height * width / (size.width * height)))
        area, enlarged = size.height * size.width, size.height > height or size.width > width
        return (round(stretch, 6), -(size.frames or 0), enlarged, area if enlarged else -area)

    fits = [bucket for bucket in buckets if frames is None or (bucket.size.frames or 1) <= frames]
    return min(fits, key=distance, default=None)


def processors_for(attention: AttentionSpec, buckets: Sequence[Bucket], tell: Callable[[str], None]) -> ByLayer:
    """What is set on which layers, the same for all sizes. tell: called with what is larger than a grid, and capped.

    Raises: ValueError, TypeError: options that were left out differ from size to size, or do not fit one of them.
    """
    made = [attention.processor(bucket.grid) for bucket in buckets]
    if any(processor != made[0] for processor in made):
        each = " or ".join(
            f"--attn {attention.name}:{short_options(x)} (of {b.size})" for x, b in zip(made, buckets, strict=True)
        )
        raise ValueError(
            f"{attention.name} takes what is left out from the token grid, and these sizes have different ones: give "
            f"all options, such as {each}"
        )
    choices = attention.by_layer(made[0])
    for layers, processor in choices:
        for bucket in buckets:
            for text in _misfits(processor, bucket):
                where = "" if layers is None else f" in {layers}"
                tell(
                    f"{processor.name} on {bucket.size}{where}, {'×'.join(map(str, bucket.grid or ()))} tokens: {text}"
                )
    return choices


def _misfits(processor: AcceleratedAttnProcessor, bucket: Bucket) -> list[str]:
    """What is capped. Raises: ValueError: it does not fit at all."""
    if bucket.grid is None:
        return []
    layout = TokenLayout(bucket.grid)
    options = processor.layer_options(layout)
    try:
        fitted = processor.mechanism.fit(layout, **options)
    except ValueError as error:
        raise ValueError(f"{processor.name} does not fit {bucket.size}: {error}") from error
    return _capped(options, fitted)


def _capped(options: Mapping[str, Any], fitted: Mapping[str, Any]) -> list[str]:
    capped = []
    for key, value in fitted.items():
        asked = options.get(key, value)
        if isinstance(value, tuple) and not isinstance(asked, (tuple, list)):
            asked = (asked,) * len(value)
        if asked != value and not isinstance(asked, list):
            capped.append(f"{key} {_text(asked)} becomes {_text(value)}")
    return capped


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
