"""Readers of picture and clip files that crop and resize to the size of a bucket."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from dit_accel.common.files import CannotWrite

from .buckets import Bucket, nearest

__all__ = ["CLIPS", "PICTURES", "TooShort", "Unreadable", "read_clip", "read_picture"]

PICTURES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp"))
CLIPS = frozenset((".mp4", ".mov", ".webm", ".mkv", ".gif", ".avi", ".m4v"))

logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it warns about every clip with rotation metadata

_PICTURE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # PIL's for unreadable files
_CLIP_ERRORS = (*_PICTURE_ERRORS, RuntimeError, IndexError, KeyError, EOFError)  # imageio's


class Unreadable(ValueError):
    """A file that cannot be read as a picture or clip. ``why`` completes "n clips that …" in the summary."""

    why = "cannot be read"


class TooShort(Unreadable):
    """A clip with fewer frames than the shortest bucket."""

    why = "are too short"


def read_picture(media: Path | bytes, name: str, buckets: Sequence[Bucket]) -> tuple[Bucket, Tensor]:
    """Read a picture, take the largest center crop of the bucket's aspect ratio and resize it.

    Args: media: path of a file, or the bytes of one. name: name for messages.
    Returns: the bucket of the nearest aspect ratio; (1, 3, height, width) float32 in [-1, 1].
    Raises: Unreadable: the file cannot be read as a picture.
    """
    try:
        with Image.open(io.BytesIO(media) if isinstance(media, bytes) else media) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
            bucket = nearest(buckets, upright.height, upright.width)
            assert bucket is not None
            fitted = _fit(upright, bucket)
    except _PICTURE_ERRORS as error:
        raise Unreadable(f"{name} cannot be read as a picture: {error}") from error
    return bucket, torch.from_numpy(fitted).permute(2, 0, 1)[None].float() / 127.5 - 1


def read_clip(
    media: Path | bytes, suffix: str, name: str, buckets: Sequence[Bucket], fps: float | None
) -> tuple[Bucket, Tensor]:
    """Read a clip; each frame is cropped and resized as in :func:`read_picture`.

    Args:
        media: path of a file, or the bytes of one. suffix: the file's suffix. name: name for messages.
        fps: frames per second to sample, centered in the clip; None: frames evenly spaced over the whole clip.
    Returns: the bucket; (1, 3, T, height, width) float32 in [-1, 1].
    Raises:
        Unreadable: the file cannot be read as a clip. TooShort: it has too few frames for every bucket.
        CannotWrite: the temporary file cannot be written.
    """
    with _as_file(media, suffix) as path:
        try:
            return _read_clip(path, name, buckets, fps)
        except Unreadable:
            raise
        except _CLIP_ERRORS as error:
            first = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), repr(error))
            raise Unreadable(f"{name} cannot be read as a clip: {first}") from error


def _read_clip(path: Path, name: str, buckets: Sequence[Bucket], fps: float | None) -> tuple[Bucket, Tensor]:
    """As :func:`read_clip`. If the file's length proves wrong, the frames are counted and the clip is read again."""
    about, counted = _about(path), False
    count = about.frames
    while True:
        stride = about.fps / fps if fps and about.fps else None
        available = count if stride is None else int((count - 1) / stride + 1e-6) + 1 if count else 0
        bucket = nearest(buckets, about.height, about.width, available)
        if bucket is None and counted:
            least = min(bucket.size.frames or 1 for bucket in buckets)
            at = f" at {fps:g} per second" if stride is not None else ""
            raise TooShort(f"{name} is too short: {available} frames{at}, expected {least} or more")
        if bucket is not None:
            wanted = _indices(count, bucket.size.frames or 1, stride)
            frames, seen = _take(path, wanted, bucket)
            if len(frames) == len(wanted):
                pixels = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None]
                return bucket, pixels.float() / 127.5 - 1
        else:
            seen = sum(1 for _ in _frames(path))
        count, counted = seen, True  # the length in the file's header may be wrong


def _indices(count: int, length: int, stride: float | None) -> list[int]:
    """Indices of ``length`` of ``count`` frames: ``stride`` apart and centered, or from first to last if it is None."""
    if stride is None:
        return np.linspace(0, count - 1, length).round().astype(int).tolist()
    first = (count - 1 - (length - 1) * stride) / 2
    return [min(max(int(first + k * stride + 0.5), 0), count - 1) for k in range(length)]


def _take(path: Path, wanted: list[int], bucket: Bucket) -> tuple[list[NDArray[np.uint8]], int]:
    """The existing frames of these ascending indices, cropped and resized; and the number of frames read."""
    taken: list[NDArray[np.uint8]] = []
    seen = 0
    with closing(_frames(path)) as frames:
        for i, frame in enumerate(frames):
            seen = i + 1
            if wanted[len(taken)] == i:
                fitted = _fit(Image.fromarray(frame), bucket)
                taken += [fitted] * wanted.count(i)
            if len(taken) == len(wanted):
                break
    return taken, seen


def _fit(picture: Image.Image, bucket: Bucket) -> NDArray[np.uint8]:
    return np.array(ImageOps.fit(picture, (bucket.size.width, bucket.size.height), Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class _About:
    """Properties in a clip's header. fps: 0 if it has none."""

    frames: int
    fps: float
    height: int
    width: int


def _about(path: Path) -> _About:
    import imageio.v2

    if path.suffix.lower() == ".gif":
        with Image.open(path) as picture:
            milliseconds = picture.info.get("duration") or 0
            fps = 1000 / milliseconds if milliseconds else 0.0
            return _About(getattr(picture, "n_frames", 1), fps, picture.height, picture.width)
    with imageio.v2.get_reader(path, format="FFMPEG") as reader:
        header = reader.get_meta_data()
    width, height = header["size"]
    return _About(round(header["duration"] * header["fps"]), float(header["fps"]), height, width)


def _frames(path: Path) -> Generator[NDArray[np.uint8], None, None]:
    """All frames in order, (H, W, 3) uint8 each."""
    import imageio.v2
    import imageio.v3

    if path.suffix.lower() == ".gif":
        yield from imageio.v3.imiter(path, plugin="pillow", mode="RGB")
        return
    with imageio.v2.get_reader(path, format="FFMPEG") as reader:
        yield from reader.iter_data()


@contextmanager
def _as_file(media: Path | bytes, suffix: str) -> Iterator[Path]:
    """Give a path of the clip, through a temporary file if it is in memory, since ffmpeg reads only files.

    Raises: CannotWrite: the temporary file cannot be written; the clip itself may be readable.
    """
    if isinstance(media, Path):
        yield media
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip{suffix}"
        try:
            path.write_bytes(media)
        except OSError as error:
            raise CannotWrite(path, error) from error
        yield path
