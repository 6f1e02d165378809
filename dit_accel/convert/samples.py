"""Training samples: latents and what the denoiser is told about them, made once and kept as files.

A sample is a file, whole or not at all; what is there is not made again, so an interrupted preparation goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import replacing, write_json
from .capture import Conditions, capture
from .latents import Unreadable, encode, read_picture

__all__ = ["Picture", "Sample", "SampleCache", "batches", "find_pictures", "read_sample"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Picture:
    """A file and its caption."""

    path: Path
    caption: str


@dataclass
class Sample:
    """latents: as the denoiser takes them, with a batch of one."""

    latents: Tensor
    conditions: Conditions

    @property
    def kind(self) -> tuple[Any, ...]:
        """Samples of one kind can be in one batch."""
        shapes = tuple((key, tuple(x.shape), x.dtype) for key, x in sorted(self.conditions.tensors.items()))
        return (tuple(self.latents.shape), shapes, json.dumps(self.conditions.plain, sort_keys=True))


def find_pictures(folder: Path) -> tuple[list[Picture], int]:
    """Pictures of a folder and below, in the order of their names, with the text of the ``.txt`` file beside or the
    entry ``{"file_name": …, "text": …}`` of a ``metadata.jsonl``; and how many had neither.

    Raises: ValueError: no folder, or no picture with a caption in it, or a metadata.jsonl that cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    captions = _metadata(folder / "metadata.jsonl")
    found, without = [], 0
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file()):
        text = path.with_suffix(".txt")
        caption = captions.get(path.relative_to(folder).as_posix())
        if caption is None and text.is_file():
            caption = text.read_text(encoding="utf-8", errors="replace")
        if caption is None or not caption.strip():
            without += 1
        else:
            found.append(Picture(path, " ".join(caption.split())))
    if not found:
        raise ValueError(
            f"{folder} has no picture with a caption ({without} without): expected a .txt file beside each, or a "
            "metadata.jsonl with file_name and text"
        )
    return found, without


def _metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    captions = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            captions[str(entry["file_name"])] = str(entry["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected file_name and text, got {line[:80]!r}") from error
    return captions


class SampleCache:
    """Samples in a folder, numbered; ``skipped.json`` says which pictures could not be read, and why."""

    def __init__(self, folder: Path, pipe: Any, model: nn.Module, call: dict[str, Any]) -> None:
        """call: arguments of the pipeline but for the prompt: height, width, num_frames, …"""
        self.folder, self.pipe, self.model, self.call = folder, pipe, model, call
        self.skipped: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def from_pictures(self, pictures: list[Picture], note: Callable[[], None]) -> list[Path]:
        """Files of the pictures that can be read. note: called after each.

        Raises: ValueError: none can.
        """
        made = []
        for i, picture in enumerate(pictures):
            path = self._path(i)
            try:
                if not path.is_file():
                    pixels = read_picture(picture.path, self.call["height"], self.call["width"])
                    self._write(path, picture.caption, partial(encode, self.pipe, pixels))
                made.append(path)
            except Unreadable as error:
                self.skipped[str(picture.path)] = str(error)
            note()
        write_json(self.folder / "skipped.json", self.skipped)
        if not made:
            raise ValueError(
                f"none of {len(pictures)} pictures can be read, the first: {next(iter(self.skipped.values()))}"
            )
        return made

    def from_teacher(self, prompts: tuple[str, ...], count: int, seed: int, note: Callable[[], None]) -> list[Path]:
        """Files of what the pipeline itself draws, prompt after prompt, each with a seed of its own."""
        made = []
        for i in range(count):
            path = self._path(i)
            if not path.is_file():
                prompt = prompts[i % len(prompts)]
                self._write(path, prompt, partial(self._draw, prompt, seed + i))
            made.append(path)
            note()
        return made

    @torch.no_grad()
    def _draw(self, prompt: str, seed: int, _: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return self.pipe(prompt=prompt, generator=generator, output_type="latent", **self.call)[0].float()

    def _path(self, i: int) -> Path:
        return self.folder / f"{i:06d}.safetensors"

    def _write(self, path: Path, caption: str, latents: Callable[[tuple[int, ...]], Tensor]) -> None:
        conditions = capture(self.pipe, self.model, {**self.call, "prompt": caption})
        made = latents(conditions.shape).cpu()
        if tuple(made.shape) != conditions.shape:
            raise ValueError(
                f"{type(self.pipe).__name__} gives latents {tuple(made.shape)}, its denoiser takes {conditions.shape}"
            )
        tensors = {"latents": made} | {f"conditions/{key}": x for key, x in conditions.tensors.items()}
        about = {"caption": caption, "latents": conditions.latents, "unit": conditions.unit, "plain": conditions.plain}
        with replacing(path) as temporary:
            save_file({k: x.contiguous() for k, x in tensors.items()}, temporary, {"sample": json.dumps(about)})


def read_sample(path: Path) -> Sample:
    """A sample that the cache wrote."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["sample"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    latents = tensors.pop("latents")
    conditions = {key.removeprefix("conditions/"): x for key, x in tensors.items()}
    return Sample(
        latents, Conditions(about["latents"], tuple(latents.shape), about["unit"], conditions, about["plain"])
    )


def batches(kinds: list[tuple[Any, ...]], size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices of samples of one kind, each epoch in another order; the last of a kind is filled up
    from its beginning."""
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
