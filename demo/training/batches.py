"""Endless stream of training batches: random scenes of the training split, laid out, captioned and tokenized."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dit_accel.demo.scenes.render import layout_scene
from dit_accel.demo.scenes.scene import (
    ARRANGEMENTS,
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    PLACES,
    PLURALS,
    SHAPES,
    SIZES,
    TEXT_LENGTH,
    TEXTURES,
    Scene,
    caption,
    sample_scene,
)
from dit_accel.demo.scenes.vocabulary import build_clip_tokenizer, build_t5_tokenizer

CHUNK = 256
NOUNS = {*SHAPES, *PLURALS.values()}
# number of classes per attribute of a named object; class 0 means "not in the caption" for optional attributes
NUM_CLASSES = (
    *(len(COLOURS), len(SHAPES), len(TEXTURES), len(SIZES), len(PLACES) + 1, len(MOTIONS) + 1),
    *(len(BACKGROUNDS), 4, len(ARRANGEMENTS) + 1),
)
NAMED = 2


@dataclass
class Batch:
    """Batch of scenes and captions.

    rows, backgrounds: as `render` takes them. nouns: (B, 2) positions of the named objects' nouns in the T5 tokens.
    labels: (B, 2, attributes) classes of each named object, -100 if there is no second object.
    """

    rows: torch.Tensor
    backgrounds: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor
    nouns: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        moved = (getattr(self, f.name) for f in fields(self))
        return Batch(*(t.to(device, non_blocking=True) for t in moved))


def _labels(scene: Scene) -> list[list[int]]:
    def optional(options: tuple[str, ...], value: str | None) -> int:
        return 0 if value is None else 1 + options.index(value)

    common = [BACKGROUNDS.index(scene.background), scene.count - 1, optional(ARRANGEMENTS, scene.arrangement)]
    rows = []
    for thing in scene.things:
        look = [COLOURS.index(thing.colour), SHAPES.index(thing.shape), TEXTURES.index(thing.texture)]
        look += [SIZES.index(thing.size), optional(PLACES, thing.place), optional(MOTIONS, thing.motion)]
        rows.append(look + common)
    return rows + [[-100] * len(NUM_CLASSES)] * (NAMED - len(rows))


class _Chunks(IterableDataset):
    def __init__(self, clip: bool, seed: int) -> None:
        self.clip, self.seed = clip, seed
        self.clip_tokenizer, self.t5_tokenizer = build_clip_tokenizer(), build_t5_tokenizer()

    def _ids(self, tokenizer: Any, captions: list[str]) -> torch.Tensor:
        pad = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True}
        return tokenizer(captions, return_tensors="pt", **pad).input_ids

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        rng = random.Random(self.seed * 1000 + (info.id if info else 0))
        while True:
            scenes = [sample_scene(rng, self.clip) for _ in range(CHUNK)]
            captions = [caption(scene, rng) for scene in scenes]
            laid_out = [layout_scene(scene, rng) for scene in scenes]
            nouns = [[i for i, word in enumerate(text.split()) if word in NOUNS] for text in captions]
            yield Batch(
                torch.tensor([rows for rows, _ in laid_out])[:, : 2 if self.clip else None],
                torch.tensor([background for _, background in laid_out]),
                self._ids(self.clip_tokenizer, captions),
                self._ids(self.t5_tokenizer, captions),
                torch.tensor([[*places, 0][:NAMED] for places in nouns]),
                torch.tensor([_labels(scene) for scene in scenes]),
            )


def half_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 on a GPU, no autocast on other devices."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class SceneStream:
    """Batches of any size, made by worker processes. `next(count)` returns a batch."""

    def __init__(self, clip: bool, device: torch.device, seed: int, workers: int) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        loader = DataLoader(_Chunks(clip, seed), batch_size=None, num_workers=workers)
        self.chunks, self.device = iter(loader), device
        self.left: list[Batch] = []

    def next(self, count: int) -> Batch:
        while sum(len(batch.rows) for batch in self.left) < count:
            self.left.append(next(self.chunks))
        whole = [torch.cat([getattr(batch, f.name) for batch in self.left]) for f in fields(Batch)]
        self.left = [Batch(*(t[count:] for t in whole))] if len(whole[0]) > count else []
        return Batch(*(t[:count] for t in whole)).to(self.device)
