"""Cache of training samples: latents and conditions, computed once and stored as one file per sample.

Files are written atomically and existing samples are reused, so an interrupted preparation resumes.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dit_accel.common.errors import BadInput
from dit_accel.common.files import remove_leftovers, replacing, write_json

from ..recipes.capture import Conditions, capture
from .buckets import Bucket
from .dataset import Example, Folder, Shards
from .latents import encode
from .media import Unreadable, read_clip, read_picture

__all__ = ["Sample", "SampleCache", "Samples", "batches", "read_sample"]

_READERS = 4  # threads that read files
_REMAKE = "remove it and run the same command again, which makes the sample again"


@dataclass
class Sample:
    """Latents in the denoiser's layout, for a batch of one, and the denoiser's other arguments."""

    latents: Tensor
    conditions: Conditions


class Samples:
    """Samples in files, read on access.

    Attributes:
        kinds: kind of each sample; samples of the same kind can be in one batch.
        empty: conditions of the empty prompt by size, if captions are dropped.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        seen: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # few kinds, each kept once
        self.kinds = [seen.setdefault(kind, kind) for kind in map(_kind, paths)]
        self.empty: dict[str, Conditions] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Sample:
        return read_sample(self.paths[i])

    def __iter__(self) -> Iterator[Sample]:
        return map(read_sample, self.paths)

    def drop_captions(self, conditions: dict[str, Conditions]) -> None:
        """Set the conditions of the empty prompt, by size. Raises: ValueError: their shapes differ from a caption's."""
        for size, shapes, _ in set(self.kinds):
            there = {key.removeprefix("conditions/"): tuple(shape) for key, shape, _ in shapes if key != "latents"}
            ours = {key: tuple(x.shape) for key, x in conditions[size].tensors.items()}
            if ours != there:
                raise ValueError(
                    f"--caption-dropout: conditions of the empty prompt have the shapes {ours}, those of captions "
                    f"{there}, so they do not fit into one batch: leave --caption-dropout out"
                )
        self.empty = conditions

    def without_caption(self, i: int) -> Conditions:
        """Conditions of the empty prompt for the size of the i-th sample."""
        return self.empty[self.kinds[i][0]]


class SampleCache:
    """Numbered samples in a folder; ``skipped.json`` lists the examples that cannot be read, with the reasons.

    Attributes:
        skipped: reason by name of the example. why: number of skipped examples by kind of reason.
    """

    def __init__(self, folder: Path, pipe: Any, model: nn.Module, buckets: Sequence[Bucket], about: dict[str, Any]):
        """Args: about: settings that samples depend on, as JSON; samples of other settings are made again."""
        self.folder, self.pipe, self.model, self.buckets = folder, pipe, model, buckets
        self.about = {**about, "calls": [bucket.call for bucket in buckets]}
        self.skipped: dict[str, str] = {}
        self.why: dict[str, int] = {}
        self._reference: dict[str, Conditions] = {}  # by size, for any caption
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)

    def from_data(self, data: Folder | Shards, fps: float | None, note: Callable[[], None]) -> list[Path]:
        """Files of the samples of all readable pictures or clips.

        Args: fps: frame rate of clips. note: called after each example.
        Raises: ValueError: no example can be read.
        """
        made, read = [], 0
        for example, pending in self._read_ahead(data, fps):
            read += 1
            path = self._path(example.number)
            try:
                if pending is not None:
                    bucket, pixels = pending.result()
                    self._write(path, bucket, _origin(example), partial(encode, self.pipe, pixels))
                made.append(path)
            except Unreadable as error:
                self.skipped[example.name] = str(error)
                self.why[error.why] = self.why.get(error.why, 0) + 1
            note()
        kind = "clips" if data.clips else "pictures"
        write_json(self.folder / "skipped.json", {**data.broken, **self.skipped})
        if not made:
            raise ValueError(f"none of {read} {kind} can be read, first error: {next(iter(self.skipped.values()))}")
        return made

    def from_teacher(self, prompts: tuple[str, ...], count: int, seed: int, note: Callable[[], None]) -> list[Path]:
        """Files of ``count`` samples that the pipeline draws, each with its own seed.

        Prompts and sizes are cycled so that every combination occurs.
        """
        made = []
        both = math.lcm(len(prompts), len(self.buckets))
        for i in range(count):
            path, prompt = self._path(f"{i:06d}"), prompts[i % len(prompts)]
            bucket = self.buckets[(i + i // both) % len(self.buckets)]
            origin = {"name": f"seed {seed + i}", "caption": prompt}
            if not self._there(path, origin):
                self._write(path, bucket, origin, partial(self._draw, bucket, prompt, seed + i))
            made.append(path)
            note()
        return made

    def _read_ahead(
        self, data: Folder | Shards, fps: float | None
    ) -> Iterator[tuple[Example, Future[tuple[Bucket, Tensor]] | None]]:
        """Examples in order, each with its pixels; None if its sample exists. Files are read ahead by threads."""
        waiting: deque[tuple[Example, Future[tuple[Bucket, Tensor]] | None]] = deque()
        with ThreadPoolExecutor(_READERS) as pool:
            for example in data:
                there = self._there(self._path(example.number), _origin(example))
                waiting.append((example, None if there else pool.submit(self._read, example, fps)))
                if len(waiting) > 2 * _READERS:
                    yield waiting.popleft()
            yield from waiting

    def _read(self, example: Example, fps: float | None) -> tuple[Bucket, Tensor]:
        if self.buckets[0].size.frames is None:
            return read_picture(example.media, example.name, self.buckets)
        return read_clip(example.media, example.suffix, example.name, self.buckets, fps)

    @torch.no_grad()
    def _draw(self, bucket: Bucket, prompt: str, seed: int, _: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return self.pipe(prompt=prompt, generator=generator, output_type="latent", **bucket.call)[0].float()

    def _path(self, number: str) -> Path:
        return self.folder / f"{number}.safetensors"

    def _there(self, path: Path, origin: dict[str, str]) -> bool:
        """Whether the file is a sample of this origin and of the current settings."""
        try:
            about = json.loads(json.dumps({**self.about, **origin}))
            return path.is_file() and _about(path).get("origin") == about and self._fits(path, origin["caption"])
        except (SafetensorError, AttributeError, LookupError, TypeError, ValueError):  # not a sample
            return False

    def _fits(self, path: Path, caption: str) -> bool:
        """Whether the file's tensors have the names and shapes of the denoiser's; captions may differ in length."""
        size, shapes, _ = _kind(path)
        bucket = next((bucket for bucket in self.buckets if str(bucket.size) == size), None)
        if bucket is None:
            return False
        if size not in self._reference:
            self._reference[size] = capture(self.pipe, self.model, {**bucket.call, "prompt": caption})
        expected, found = self._reference[size], {key: (shape, dtype) for key, shape, dtype in shapes}
        if found.pop("latents", None) != (expected.shape, "F32"):
            return False
        there = {key.removeprefix("conditions/"): shape for key, (shape, _) in found.items()}
        return there.keys() == expected.tensors.keys() and all(
            len(shape) == expected.tensors[key].dim()
            and (len(shape) < 3 or shape[-1] == expected.tensors[key].shape[-1])
            for key, shape in there.items()
        )

    def _write(
        self, path: Path, bucket: Bucket, origin: dict[str, str], latents: Callable[[tuple[int, ...]], Tensor]
    ) -> None:
        """Make a sample and write it. latents: called with the shape that the denoiser takes.

        Raises: ValueError: latents or conditions are not finite, or the latents have another shape.
        """
        conditions = capture(self.pipe, self.model, {**bucket.call, "prompt": origin["caption"]})
        made = latents(conditions.shape).cpu()
        if tuple(made.shape) != conditions.shape:
            raise ValueError(
                f"{type(self.pipe).__name__} gives latents {tuple(made.shape)}, its denoiser expects {conditions.shape}"
            )
        tensors = {"latents": made} | {f"conditions/{key}": x for key, x in conditions.tensors.items()}
        wrong = _not_finite(tensors)
        if wrong is not None:
            raise ValueError(
                f"{type(self.pipe).__name__} gives {wrong} that are not finite for {origin['name']}: leave this "
                "example out, or check that the pipeline works"
            )
        about = {
            "origin": {**self.about, **origin}, "size": str(bucket.size), "latents": conditions.latents,
            "unit": conditions.unit, "plain": conditions.plain,
        }  # fmt: skip
        with replacing(path) as temporary:
            save_file({k: x.contiguous() for k, x in tensors.items()}, temporary, {"sample": json.dumps(about)})


def _origin(example: Example) -> dict[str, str]:
    return {"name": example.name, "caption": example.caption}


def _about(path: Path) -> dict[str, Any]:
    """Metadata of a sample file."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["sample"])


def _kind(path: Path) -> tuple[Any, ...]:
    """Kind of a sample, from the file's header: size, tensors and plain arguments.

    The size is part of it because position arguments may differ between two sizes whose shapes are all equal.
    """
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["sample"])
        slices = {key: file.get_slice(key) for key in sorted(file.keys())}
    shapes = tuple((key, tuple(x.get_shape()), x.get_dtype()) for key, x in slices.items())
    return (about["size"], shapes, json.dumps(about["plain"], sort_keys=True))


def read_sample(path: Path) -> Sample:
    """Read a sample that the cache has written.

    Raises: BadInput: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["sample"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is not a sample of a conversion ({error}): {_REMAKE}") from error
    wrong = _not_finite(tensors)
    if wrong is not None:
        raise BadInput(f"{path}: its {wrong} are not finite: {_REMAKE}")
    latents = tensors.pop("latents")
    conditions = {key.removeprefix("conditions/"): x for key, x in tensors.items()}
    return Sample(
        latents, Conditions(about["latents"], tuple(latents.shape), about["unit"], conditions, about["plain"])
    )


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Name of the first tensor with NaN (or, for latents, infinity); None if all are usable.

    Conditions may be infinite, since additive masks are.
    """
    for key, x in tensors.items():
        if x.is_floating_point() and bool(x.isnan().any() or (key == "latents" and x.isinf().any())):
            return key
    return None


def batches(kinds: list[tuple[Any, ...]], size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of sample indices, each batch of one kind, in another order in each epoch.

    The last batch of a kind is filled up from the beginning of its order.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(i)
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        made = []
        for group in groups.values():
            order = [group[i] for i in torch.randperm(len(group), generator=generator)]
            order += [order[i % len(group)] for i in range(-len(order) % size)]
            made += [order[i : i + size] for i in range(0, len(order), size)]
        yield from (made[i] for i in torch.randperm(len(made), generator=generator))
        epoch += 1
