"""Train one of the embedded pipelines from scratch on scenes rendered on the fly, and write the pipeline.

    python -m dit_accel.demo.training.train_embedded image --out demo/image --minutes 9
    python -m dit_accel.demo.training.train_embedded video --out demo/video --minutes 9 --resume demo/video
    python -m dit_accel.demo.training.train_embedded image --out demo/image --only-eval --seed 20261123
    python -m dit_accel.demo.training.train_embedded image --out large --heads 6 --single-blocks 5 \\
        --parts demo/image --lr 6e-4

The minutes cover everything: training of text encoders, autoencoder and denoiser, writing the pipeline and, in the
reserve, drawing and checking held-out captions with it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

START_TIME = time.monotonic()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import DiffusionPipeline, FluxPipeline, WanPipeline  # noqa: E402
from PIL import Image  # noqa: E402

from dit_accel.demo.scenes.evaluate_captions import check_drawing, draw_scenes, held_out_scenes  # noqa: E402
from dit_accel.demo.scenes.render import layout_scene, render  # noqa: E402
from dit_accel.demo.scenes.scene import Scene, altered_captions  # noqa: E402
from dit_accel.demo.training.batches import SceneStream  # noqa: E402
from dit_accel.demo.training.build import (  # noqa: E402
    MAX_BYTES,
    Config,
    ImageConfig,
    VideoConfig,
    build_image_pipeline,
    build_video_pipeline,
    call_defaults,
    save_pipeline,
    smoke_config,
)
from dit_accel.demo.training.train_denoiser import train_denoiser  # noqa: E402
from dit_accel.demo.training.train_text import train_text  # noqa: E402
from dit_accel.demo.training.train_vae import clip_times, measure_psnr, train_vae  # noqa: E402

LOG_EVERY = 10.0


class Log:
    """Print at most one line every ten seconds, or immediately with `now`."""

    def __init__(self, kind: str) -> None:
        self.kind, self.last = kind, -LOG_EVERY

    def __call__(self, text: str | Callable[[], str], now: bool = False) -> None:
        passed = time.monotonic() - START_TIME
        if now or passed - self.last >= LOG_EVERY:
            self.last = passed
            print(f"[{self.kind} {passed:6.1f} s] {text if isinstance(text, str) else text()}", flush=True)


def render_scenes(scenes: list[Scene], config: Config, device: torch.device, seed: int = 0) -> torch.Tensor:
    rng = random.Random(seed)
    rows, backgrounds = zip(*(layout_scene(scene, rng) for scene in scenes), strict=True)
    moments = clip_times(config, device)
    return render(torch.tensor(rows).to(device), torch.tensor(backgrounds).to(device), config.size, moments)


def evaluate(
    folder: Path, config: Config, count: int, device: torch.device, log: Log, seed: int = 0
) -> tuple[dict, np.ndarray]:
    """Draw `count` held-out captions with the written pipeline and check them; return figures and pictures."""
    clip = bool(config.frames)
    pipe = (WanPipeline if clip else FluxPipeline).from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(count, clip, seed)
    psnr = measure_psnr(pipe, render_scenes(scenes[:16], config, device))
    log(f"autoencoder PSNR {np.mean(psnr):.1f} dB (lowest {min(psnr):.1f})", True)
    batch = 1 if device.type == "cpu" else 10 if clip else 25
    drawn = draw_scenes(pipe, scenes, call_defaults(config), batch, seed)
    verdicts = [check_drawing(each, scene) for each, scene in zip(drawn, scenes, strict=True)]
    wrong = [(scene.key, verdict.problems) for scene, verdict in zip(scenes, verdicts, strict=True) if not verdict.ok]
    rng = random.Random(1)
    altered = [
        check_drawing(each, text)
        for each, s in zip(drawn, scenes, strict=True)
        for text in altered_captions(s, rng).values()
    ]
    figures = {
        "captions": count,
        "right": sum(verdict.ok for verdict in verdicts) / count,
        "altered_captions_rejected": 1 - sum(verdict.ok for verdict in altered) / len(altered),
        "psnr_mean": float(np.mean(psnr)),
        "psnr_lowest": min(psnr),
        "wrong": wrong,
    }
    return figures, drawn


def contact_sheet(drawn: np.ndarray, path: Path, side: int = 160, columns: int = 8) -> None:
    """Write the first drawings as one PNG: pictures in a grid, clips as one row of frames each."""
    if drawn.ndim == 5:
        moments = np.linspace(0, drawn.shape[1] - 1, columns).round().astype(int)
        drawn = drawn[:12, moments].reshape(-1, *drawn.shape[2:])
    drawn = drawn[: 8 * columns]
    rows = -(-len(drawn) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side))
    for i, each in enumerate(drawn):
        tile = Image.fromarray((each * 255).round().astype(np.uint8)).resize((side, side))
        sheet.paste(tile, (i % columns * side, i // columns * side))
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("image", "video"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument("--minutes", type=float, default=9.0, help="wall-clock budget of the whole run")
    parser.add_argument("--resume", type=Path, help="continue training this pipeline; its autoencoder is not trained")
    parser.add_argument(
        "--parts", type=Path, help="train a new denoiser with the text encoders and autoencoder of this pipeline"
    )
    parser.add_argument(
        "--heads", type=int, help="heads of the denoiser, 64 channels each; lifts the limit on the pipeline's size"
    )
    parser.add_argument(
        "--single-blocks", type=int, help="single blocks of the image denoiser; lifts the limit on the size"
    )
    parser.add_argument("--blocks", type=int, help="blocks of the video denoiser; lifts the limit on the size")
    parser.add_argument("--eval", type=int, default=100, help="held-out captions to draw and check at the end")
    parser.add_argument(
        "--only-eval", action="store_true", help="no training: draw and check with the pipeline in --out"
    )
    parser.add_argument("--reserve", type=float, default=40.0, help="seconds reserved for writing and checking")
    parser.add_argument("--workers", type=int, default=5, help="processes that generate scenes")
    parser.add_argument("--lr", type=float, help="peak learning rate of the denoiser; default from the configuration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: a run of seconds on a CPU")
    args = parser.parse_args()
    run(args)


def run(args: argparse.Namespace) -> None:
    log = Log(args.kind)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # with cuDNN, a compiled backward failed with an illegal memory access
    video = args.kind == "video"
    config = smoke_config(args.kind) if args.smoke else (VideoConfig() if video else ImageConfig())
    sizes = {name: getattr(args, name) for name in ("heads", "single_blocks", "blocks")}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    config = replace(config, **sizes)
    max_bytes = None if sizes else MAX_BYTES

    def save(pipe: DiffusionPipeline) -> int:
        return save_pipeline(pipe, args.out, config, max_bytes)

    if args.only_eval:
        write_evaluation(args, config, device, log, args.seed)
        return
    stream = SceneStream(video, device, args.seed, 0 if args.smoke else args.workers)
    stream.next(1)
    if args.resume:
        pipe = (WanPipeline if video else FluxPipeline).from_pretrained(args.resume)
    else:
        pipe = build_video_pipeline(config) if isinstance(config, VideoConfig) else build_image_pipeline(config)
    if args.parts:
        other = type(pipe).from_pretrained(args.parts)
        pipe.register_modules(**{k: x for k, x in other.components.items() if k not in ("transformer", "scheduler")})
    pipe.to(device)
    log(f"denoiser of {sum(p.numel() for p in pipe.transformer.parameters()):,} parameters", True)
    log(f"on {device}, {config}", True)
    end = START_TIME + 60 * args.minutes - args.reserve
    total = end - time.monotonic()
    if not args.resume and not args.parts:
        right = train_text(pipe, config, stream, time.monotonic() + config.text_share * total, log)
        log(f"text encoders: {right:.4f} of the attributes right", True)
        train_vae(pipe, config, stream, time.monotonic() + config.vae_share * total, log)
        log(f"autoencoder trained, {save(pipe):,} bytes written", True)
    phases = config.resume_phases if args.resume else config.phases
    config.lr = args.lr or config.lr
    steps = train_denoiser(pipe, config, stream, phases, end, log, save)
    log(f"{steps} denoiser steps, {save(pipe):,} bytes written", True)
    del pipe
    if args.eval:
        write_evaluation(args, config, device, log)


def write_evaluation(args: argparse.Namespace, config: Config, device: torch.device, log: Log, seed: int = 0) -> None:
    """Evaluate the pipeline in `args.out`; write the figures and a sheet of drawings beside it."""
    figures, drawn = evaluate(args.out, config, args.eval, device, log, seed)
    path = args.out.parent / f"{args.out.name}_metrics.json"
    path.write_text(json.dumps({"seed": seed, **figures}, indent=1) + "\n")
    contact_sheet(drawn, args.out.parent / f"{args.out.name}_sheet.png")
    log(f"{figures['right']:.0%} of {args.eval} held-out captions drawn right", True)
    for key, problems in figures["wrong"][:30]:
        log(f"  {key}: {', '.join(problems)}", True)
    print(json.dumps({k: v for k, v in figures.items() if k != "wrong"}), flush=True)


if __name__ == "__main__":
    main()
