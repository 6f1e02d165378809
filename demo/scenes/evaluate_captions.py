"""Prompt check: draw held-out captions with a pipeline trained on scenes, and check the drawings."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from dit_accel.demo.scenes.scene import Scene, caption, sample_scene
from dit_accel.demo.scenes.scene_checker import Verdict, check_clip, check_picture

__all__ = ["check_drawing", "draw_scenes", "held_out_scenes", "prompt_check"]

_MIN_PARALLEL = 64  # up to this number, drawings are checked in this process
_WORKERS = min(8, max(1, (os.cpu_count() or 1) // 4))  # they check drawings while the next are drawn


def held_out_scenes(count: int, clip: bool, seed: int = 0) -> list[Scene]:
    """First `count` scenes of a fixed sequence of held-out scenes."""
    rng = random.Random(seed)
    return [sample_scene(rng, clip, held_out=True) for _ in range(count)]


def draw_scenes(
    pipe: DiffusionPipeline, scenes: list[Scene], arguments: dict[str, Any], batch: int, seed: int = 0
) -> np.ndarray:
    """Draw pictures (N, H, W, 3) or clips (N, T, H, W, 3) in 0…1, one per scene, each with its own seed."""
    return np.concatenate(list(_drawings(pipe, scenes, arguments, batch, seed)))


def _drawings(pipe: Any, scenes: list[Scene], arguments: dict[str, Any], batch: int, seed: int) -> Iterator[np.ndarray]:
    rng = random.Random(seed)
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        prompts = [caption(scene, rng) for scene in part]
        yield np.asarray(pipe(prompts, generator=generators, output_type="np", **arguments)[0])


def check_drawing(drawing: np.ndarray, expected: str | Scene) -> Verdict:
    """Check a picture or clip against a caption."""
    return (check_clip if drawing.ndim == 4 else check_picture)(drawing, expected)


def prompt_check(
    pipe: Any, arguments: dict[str, Any], count: int, note: Callable[[int], None] | None = None, seed: int = 0
) -> list[bool]:
    """Draw the first `count` held-out captions, each with its own seed, and return which are right.

    Args:
        arguments: arguments of the pipeline's call, without the prompt.
        note: called after each batch with the number of new drawings.
    """
    clip = "num_frames" in arguments
    scenes = held_out_scenes(count, clip, seed)
    batch = 1 if pipe.device.type == "cpu" else 20 if clip else 40
    done: list[Any] = []
    context = multiprocessing.get_context("spawn")
    with torch.no_grad(), ProcessPoolExecutor(_WORKERS, context) as pool:
        for drawn in _drawings(pipe, scenes, arguments, batch, seed):
            pixels = (drawn.clip(0, 1) * 255).round().astype(np.uint8)
            part = scenes[len(done) : len(done) + len(pixels)]
            if count > _MIN_PARALLEL:  # check while the next batch is drawn
                done += [pool.submit(_is_right, *pair) for pair in zip(pixels, part, strict=True)]
            else:
                done += [_is_right(*pair) for pair in zip(pixels, part, strict=True)]
            if note is not None:
                note(len(pixels))
        return [x if isinstance(x, bool) else x.result() for x in done]


def _is_right(drawing: np.ndarray, scene: Scene) -> bool:
    return check_drawing(drawing, scene).ok
