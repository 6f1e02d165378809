"""Pictures and clips read from files, in the size of their bucket."""

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

from ..files import CannotWrite
from .buckets import Bucket, nearest

__all__ = ["CLIPS", "PICTURES", "TooShort", "Unreadable", "read_clip", "read_picture"]

PICTURES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp"))
CLIPS = frozenset((".mp4", ".mov", ".webm", ".mkv", ".gif", ".avi", ".m4v"))

logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it warns of every clip that is stored on its side

_NO_PICTURE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # PIL's for what is no picture
_NO_CLIP = (*_NO_PICTURE, RuntimeError, IndexError, KeyError, EOFError)  # imageio's


class Unreadable(ValueError):
    """A file that is no picture or clip."""

    why = "cannot be read"


class TooShort(Unreadable):
    """A clip with fewer frames than every bucket has."""

    why = "are too short"


def read_picture(media: Path | bytes, name: str, buckets: Sequence[Bucket]) -> tuple[Bucket, Tensor]:
    """The bucket, and (1, 3, height, width) float32 in [-1, 1]: the largest part in the middle that has the bucket's
    proportions, resized.

    Args: media: a file, or what is in it. name: for errors.
    Raises: Unreadable: it cannot be read as a picture.
    """
    try:
        with Image.open(io.BytesIO(media) if isinstance(media, bytes) else media) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
            bucket = nearest(buckets, upright.height, upright.width)
            assert bucket is not None
            fitted = _fit(upright, bucket)
    except _NO_PICTURE as error:
        raise Unreadable(f"{name} cannot be read as a picture: {error}") from error
    return bucket, torch.from_numpy(fitted).permute(2, 0, 1)[None].float() / 127.5 - 1


def read_clip(
    media: Path | bytes, suffix: str, name: str, buckets: Sequence[Bucket], fps: float | None
) -> tuple[Bucket, Tensor]:
    """The bucket, and (1, 3, T, height, width) float32 in [-1, 1], each frame cut and resized as a picture is.

    Args:
        media: a file, or what is in it. suffix: of the file. name: for errors.
        fps: frames a second that are taken, from the middle of the clip; None = evenly over the whole clip.
    Raises: Unreadable: it cannot be read as a clip. TooShort: it has not enough frames for any bucket. CannotWrite: no
        room for a temporary file.
    """
    with _as_file(media, suffix) as path:
        try:
            return _read_clip(path, name, buckets, fps)
        except Unreadable:
            raise
        except _NO_CLIP as error:
            first = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), repr(error))
            raise Unreadable(f"{name} cannot be read as a clip: {first}") from error


def _read_clip(path: Path, name: str, buckets: Sequence[Bucket], fps: float | None) -> tuple[Bucket, Tensor]:
    about, counted = _about(path), False
    count = about.frames
    while True:
        stride = about.fps / fps if fps and about.fps else None
        available = count if stride is None else int((count - 1) / stride + 1e-6) + 1 if count else 0
        bucket = nearest(buckets, about.height, about.width, available)
        if bucket is None and counted:
            least = min(bucket.size.frames or 1 for bucket in buckets)
            at = f" at {fps:g} a second" if stride is not None else ""
            raise TooShort(f"{name} is too short: {available} frames{at}, expected {least} or more")
        if bucket is not None:
            wanted = _indices(count, bucket.size.frames or 1, stride)
            frames, seen = _take(path, wanted, bucket)
            if len(frames) == len(wanted):
                pixels = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None]
                return bucket, pixels.float() / 127.5 - 1
        else:
            seen = sum(1 for _ in _frames(path))
        count, counted = seen, True  # what the file says of its length need not be so


def _indices(count: int, length: int, stride: float | None) -> list[int]:
    """Of so many frames out of ``count``. stride: their distance; None = from the first to the last."""
    if stride is None:
        return np.linspace(0, count - 1, length).round().astype(int).tolist()
    first = (count - 1 - (length - 1) * stride) / 2
    return [min(max(int(first + k * stride + 0.5), 0), count - 1) for k in range(length)]


def _take(path: Path, wanted: list[int], bucket: Bucket) -> tuple[list[NDArray[np.uint8]], int]:
    """The frames of these indices (ascending) that there are, fitted; and how many were read for it."""
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
    """What a file says of itself. fps: 0 = nothing."""

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
        told = reader.get_meta_data()
    width, height = told["size"]
    return _About(round(told["duration"] * told["fps"]), float(told["fps"]), height, width)


def _frames(path: Path) -> Generator[NDArray[np.uint8], None, None]:
    """(H, W, 3) each, from the first on."""
    import imageio.v2
    import imageio.v3

    if path.suffix.lower() == ".gif":
        yield from imageio.v3.imiter(path, plugin="pillow", mode="RGB")
        return
    with imageio.v2.get_reader(path, format="FFMPEG") as reader:
        yield from reader.iter_data()


@contextmanager
def _as_file(media: Path | bytes, suffix: str) -> Iterator[Path]:
    """ffmpeg reads files. Raises: CannotWrite: there is no room for a temporary one, which is not the clip's fault."""
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
