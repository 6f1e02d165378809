"""Write scenes as pictures or clips, and their captions as metadata.jsonl: a folder for `dit-accel convert --data`.

python -m dit_accel.demo.scenes.write_scenes image --out scenes --count 2000 --seed 1
python -m dit_accel.demo.scenes.write_scenes video --out clips --count 500 --seed 1
python -m dit_accel.demo.scenes.write_scenes image --out held-out --count 100 --seed 2 --held-out
"""

from __future__ import annotations

import argparse
import json
import os
import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import imageio.v2
import numpy as np
import torch
from PIL import Image

from dit_accel.common.files import replacing
from dit_accel.demo.scenes.render import CLIP_FRAMES, CLIP_SIZE, IMAGE_SIZE, layout_scene, render
from dit_accel.demo.scenes.scene import caption, sample_scene

__all__ = ["write_scenes"]

FPS = 8
_CHUNK = 16  # scenes per task of a process


def write_scenes(
    folder: Path, count: int, clip: bool = False, seed: int = 0, held_out: bool = False, size: int | None = None,
    workers: int = 1,
) -> None:  # fmt: skip
    """Write one picture ``000000.png`` (or clip ``000000.mp4``) per scene, and their captions.

    Args:
        clip: write clips for the embedded video pipeline, instead of pictures for the image pipeline.
        held_out: use scenes that the embedded pipelines were not trained on.
        size: pixels per side; None = the pipeline's size.
        workers: number of processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = partial(_draw, folder, clip, seed, held_out, size or (CLIP_SIZE if clip else IMAGE_SIZE))
    starts = [range(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
    if workers > 1:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            made = list(pool.map(draw, starts))
    else:
        made = [draw(part) for part in starts]
    with replacing(folder / "metadata.jsonl") as temporary:
        temporary.write_text("".join(line for part in made for line in part), encoding="utf-8")


def _draw(folder: Path, clip: bool, seed: int, held_out: bool, size: int, numbers: range) -> list[str]:
    """Write the scenes with these numbers; return their lines of metadata.jsonl."""
    torch.set_num_threads(1)
    moments = torch.linspace(0, 1, CLIP_FRAMES) if clip else None
    lines = []
    for i in numbers:
        rng = random.Random(f"{seed} {i}")  # a scene does not depend on those before it
        scene = sample_scene(rng, clip, held_out)
        rows, background = layout_scene(scene, rng)
        drawn = render(torch.tensor([rows]), torch.tensor([background]), size, moments)[0]
        pixels = ((drawn + 1) * 127.5).round().clamp(0, 255).byte().movedim(0, -1).numpy()
        path = folder / f"{i:06d}.{'mp4' if clip else 'png'}"
        with replacing(path) as temporary:
            _write(temporary, pixels)
        lines.append(json.dumps({"file_name": path.name, "text": caption(scene, rng)}) + "\n")
    return lines


def _write(path: Path, pixels: np.ndarray) -> None:
    if pixels.ndim == 3:
        Image.fromarray(pixels).save(path)
        return
    with imageio.v2.get_writer(  # nearly lossless: captions name colours
        path, format="FFMPEG", fps=FPS, codec="libx264", pixelformat="yuv444p", output_params=["-crf", "4"]
    ) as writer:
        for frame in pixels:
            writer.append_data(frame)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("image", "video"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--held-out", action="store_true", help="use scenes that the embedded pipelines were not trained on"
    )
    parser.add_argument("--size", type=int, help="pixels per side; default the pipeline's size")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    write_scenes(args.out, args.count, args.kind == "video", args.seed, args.held_out, args.size, args.workers)


if __name__ == "__main__":
    main()
