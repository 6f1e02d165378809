"""Convert an embedded pipeline (or another one trained on scenes) to each mechanism, and measure the loss in quality.

    python -m dit_accel.demo.training.convert_embedded image --out conversions/image
    python -m dit_accel.demo.training.convert_embedded video --out conversions/video --only sla --only gna

Each mechanism computes a tenth of the logits. The script measures the loss on held-out scenes and the share of held-out
captions drawn right, for the teacher and for the student before and after training. If a run is interrupted, run the
same command again: it resumes from the last checkpoint. The output folder gets ``quality.json``, ``quality.png``
(teacher, before, after) and, per mechanism, a folder for ``load_attention``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from dit_accel.bench.results import KEYS, now, read_results
from dit_accel.common.bundled import IMAGE, VIDEO
from dit_accel.common.choices import LoraLayers, Sampling
from dit_accel.common.files import replacing, write_json
from dit_accel.conversion.card import write_card
from dit_accel.conversion.evaluate import Evaluation
from dit_accel.conversion.recipes.recipe import RECIPES, parse_weight, reweighted
from dit_accel.conversion.request import Request, Source
from dit_accel.conversion.run import run
from dit_accel.demo.scenes.evaluate_captions import prompt_check
from dit_accel.demo.scenes.write_scenes import write_scenes
from dit_accel.install.installation import denoisers, installed_layers
from dit_accel.mechanisms.attn_spec import parse_attention
from dit_accel.mechanisms.registry import PROCESSORS

__all__ = ["MECHANISMS"]

# Options of about a tenth of the logits of 64×64 tokens with 40 text tokens (image), and of 13×16×16 tokens (video).
# The options per layer were found with search_layer_options (125 seconds each on a GPU, starting from options chosen by
# hand), except the image's LLSA, which was chosen by hand: its loss after the same number of steps was lower (+24.0 %,
# against +31.1 % for the result of the search).
_OPTIONS = Path(__file__).parent / "options"
MECHANISMS = {
    kind: {name: str(path) for name in PROCESSORS if (path := _OPTIONS / kind / f"{name}.yaml").is_file()}
    for kind in ("image", "video")
}
LEVELS = 8
HELD_OUT_SEED = 20261125


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=tuple(MECHANISMS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pipeline", type=Path, help="folder of the teacher; default the embedded pipeline")
    parser.add_argument(
        "--only", action="append", choices=tuple(MECHANISMS["image"]), help="convert only this mechanism; repeatable"
    )
    parser.add_argument(
        "--attn",
        action="append",
        metavar="SPEC",
        default=[],
        help="replaces the default options of its mechanism; repeatable",
    )
    parser.add_argument("--recipe", default="clear")
    parser.add_argument("--train", default="lora")
    parser.add_argument("--lora-layers", default="attention", choices=get_args(LoraLayers))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--timestep-sampling",
        default="uniform",
        choices=get_args(Sampling),
        help="distribution of training noise levels; the loss is always evaluated at even levels",
    )
    parser.add_argument("--loss-weight", action="append", metavar="NAME=WEIGHT", type=parse_weight, default=[])
    parser.add_argument("--cuda-graph", action="store_true")
    parser.add_argument("--caption-dropout", type=float, default=0.0, metavar="SHARE")
    parser.add_argument("--scenes", type=int, default=2000, help="number of training scenes")
    parser.add_argument("--held-out", type=int, default=64, help="number of held-out scenes for the loss")
    parser.add_argument("--captions", type=int, default=1000, help="number of held-out captions to draw and check")
    parser.add_argument("--captions-before", type=int, help="number of captions for the untrained student; default all")
    parser.add_argument("--pictures", type=int, default=4, help="number of prompts in quality.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed-precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--results", type=Path, help="file to which the rows are added; default quality.json in --out")
    parser.add_argument("--device", choices=("cpu",))
    convert_all(parser.parse_args())


def convert_all(args: argparse.Namespace) -> None:
    console, embedded = Console(), VIDEO if args.kind == "video" else IMAGE
    clip = args.kind == "video"
    pipeline = args.pipeline or embedded.folder
    size = json.loads((pipeline / "defaults.json").read_text())["height"]
    for name, count, seed in (("scenes", args.scenes, args.seed), ("held-out", args.held_out, HELD_OUT_SEED)):
        folder = args.out / name
        if not (folder / "metadata.jsonl").is_file():
            write_scenes(folder, count, clip, seed, name == "held-out", size, os.cpu_count() or 1)
    source = Source(
        pipeline=str(pipeline), data=args.out / "scenes", prompts=embedded.prompts, samples=args.scenes,
        seed=args.seed, device=args.device, out=args.out,
    )  # fmt: skip
    held_out = replace(source, data=args.out / "held-out", seed=HELD_OUT_SEED, out=args.out / "teacher")
    held_out.out.mkdir(exist_ok=True)
    specs = MECHANISMS[args.kind] | {parse_attention(text).name: text for text in args.attn}
    chosen = args.only or list(specs)
    left = [name for name in chosen if not (args.out / name / "quality.json").is_file()]
    evaluation = None
    for name in left:
        folder = args.out / name
        folder.mkdir(exist_ok=True)
        if not (folder / "samples").exists():
            (args.out / "samples").mkdir(exist_ok=True)
            (folder / "samples").symlink_to(Path("..") / "samples")  # shared by all mechanisms
        run(_request(args, replace(source, out=folder), specs[name]), console)
        evaluation = evaluation or Evaluation(
            held_out, console, levels=LEVELS, pictures=args.pictures, check=partial(_check, held_out.out),
            captions=args.captions, mixed_precision=args.mixed_precision, batch=LEVELS,
        )  # fmt: skip
        row, about = _measure(args, evaluation, name, specs[name]), evaluation.about()
        on = {key: about[key] for key in ("machine", "versions", "figures")}
        write_json(folder / "quality.json", {"kind": "quality", "date": now(), **on, "rows": [row]})
        console.print(_line(row), highlight=False, soft_wrap=True)
    done = [name for name in specs if (args.out / name / "quality.json").is_file()]
    if done:
        _write(args.results or args.out / "quality.json", [args.out / name / "quality.json" for name in done])
        _picture(args.out, done, min(args.pictures, len(embedded.prompts)))


def _measure(args: argparse.Namespace, evaluation: Evaluation, name: str, text: str) -> dict[str, Any]:
    """Row of the results: a mechanism before and after training."""
    folder = args.out / name
    before = evaluation.measure(parse_attention(text), folder / "before", args.captions_before)
    after = evaluation.measure(str(folder), folder / "report")
    write_json(folder / "report/evaluate.json", {**evaluation.about(), **after})
    write_card(folder)
    result = json.loads((folder / "convert.json").read_text())
    parameters = sum(p.numel() for p in evaluation.teacher.parameters())
    return {
        "teacher": f"{args.kind}, {parameters / 1e6:.1f} M", "mechanism": name, "training": _training(args),
        "attention": text,
        "before": before, "after": after, "steps": result["steps"], "batch": args.batch, "recipe": args.recipe,
        "lr": args.lr, "rank": args.rank if args.train == "lora" else None, "scenes": args.scenes,
        "trained_parameters": result["trained_parameters"], "last_losses": result["history"][-1],
        "samples": len(evaluation.samples), "call": evaluation.call,
        "bytes": (folder / "dit_accel.safetensors").stat().st_size, "status": "complete",
    }  # fmt: skip


def _training(args: argparse.Namespace) -> str:
    """Description of the losses of the last stage and of the noise levels."""
    stage = reweighted(RECIPES[args.recipe], dict(args.loss_weight)).stages[-1]
    losses = [name for name in ("flow", "prediction", "attention", "matching") if stage.weight(name)]
    levels = {"shift": "shifted levels", "uniform": "even levels", "mixed": "mixed levels"}[args.timestep_sampling]
    dropped = f", {args.caption_dropout:.0%} without caption" if args.caption_dropout else ""
    return f"{' + '.join(losses)}, {levels}{dropped}"


def _check(folder: Path, pipe: Any, call: dict[str, Any], count: int, note: Callable[[int], None]) -> list[bool]:
    """Run the prompt check; the teacher's result is cached in a file, as it is the same for all mechanisms."""
    path = folder / f"captions-{count}.json"
    if any(installed_layers(model) for model in denoisers(pipe).values()):
        return prompt_check(pipe, call, count, note)
    if not path.is_file():
        write_json(path, {"right": prompt_check(pipe, call, count, note)})
    return list(json.loads(path.read_text())["right"])


def _write(path: Path, measured: list[Path]) -> None:
    """Write the rows of these files, keeping existing rows of other teachers and mechanisms."""
    each = [read_results(file) for file in measured]
    rows = [row for one in each for row in one["rows"]]
    names = {tuple(row[key] for key in KEYS["quality"]) for row in rows}
    earlier = read_results(path)["rows"] if path.is_file() else []
    kept = [row for row in earlier if tuple(row[key] for key in KEYS["quality"]) not in names]
    command = ["python -m dit_accel.demo.training.convert_embedded", *sys.argv[1:]]
    write_json(path, {**each[-1], "status": "complete", "smoke": False, "command": command, "rows": kept + rows})


def _request(args: argparse.Namespace, source: Source, attention: str) -> Request:
    return Request(
        source=source, attention=parse_attention(attention), recipe=args.recipe, train=args.train, rank=args.rank,
        steps=args.steps, batch=args.batch, accumulate=1, lr=args.lr, warmup=min(50, args.steps // 4),
        mixed_precision=args.mixed_precision, gradient_checkpointing=False, save_every=200, sample_every=0,
        tracker=None, lora_layers=args.lora_layers, schedule="cosine", save_dtype="float16",
        sampling=args.timestep_sampling, weights=tuple(args.loss_weight), cuda_graph=args.cuda_graph,
        caption_dropout=args.caption_dropout,
    )  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    def side(report: dict[str, Any]) -> str:
        check = report.get("prompt_check")
        captions = "" if check is None else f", captions {check['points']:+.1f} points"
        return f"loss {100 * (report['flow_loss']['student_over_teacher'] - 1):+.1f} %{captions}"

    return (
        f"{row['attention']}, {row['after']['logit_fraction']:.1%} of the logits: before {side(row['before'])}; after "
        f"{side(row['after'])}; {row['bytes']:,} bytes"
    )


def _picture(out: Path, names: list[str], pictures: int) -> None:
    """Write ``quality.png``: one row per prompt with the teacher's picture, then each mechanism's before and after."""
    rows = []
    for i in range(pictures):
        tiles: list[np.ndarray] = []
        for name in names:
            for side in ("before", "report"):
                both = np.asarray(Image.open(out / name / side / f"picture-{i}.png").convert("RGB"))
                half = both.shape[1] // 2
                tiles += [both[:, half:]] if tiles else [both[:, :half], both[:, half:]]
        rows.append(np.concatenate(tiles, 1))
    if not rows:
        return
    drawn = Image.fromarray(np.concatenate(rows))
    drawn = drawn.resize((drawn.width // 2, drawn.height // 2), Image.Resampling.LANCZOS)
    headings = ["teacher", *(f"{name}, {side}" for name in names for side in ("not trained", "trained"))]
    width = drawn.width // len(headings)
    font = ImageFont.load_default(max(10, width // 12))
    strip = width // 6
    sheet = Image.new("RGB", (drawn.width, drawn.height + strip), "white")
    sheet.paste(drawn, (0, strip))
    pen = ImageDraw.Draw(sheet)
    for i, heading in enumerate(headings):
        pen.text((i * width + width // 2, strip // 2), heading, "black", font, "mm")
    with replacing(out / "quality.png") as temporary:
        sheet.save(temporary)


if __name__ == "__main__":
    main()
