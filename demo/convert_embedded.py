"""Converts an embedded pipeline (or another of this language) into each mechanism, and measures what was lost.

    python -m dit_accel.demo.convert_embedded image --out conversions/image
    python -m dit_accel.demo.convert_embedded video --out conversions/video --only sla --only gna

For each mechanism at a tenth of the logits: the loss on held-out scenes and the share of held-out captions drawn right,
by the teacher, by the student before it is trained and after. Stopped, the same command goes on. ``quality.json`` and
``quality.png`` (teacher, before, after) are written into the out folder, and for each mechanism a folder for
``load_attention``.
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
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from dit_accel.attn_spec import parse_attention
from dit_accel.bench.results import KEYS, now, read_results
from dit_accel.convert.card import write_card
from dit_accel.convert.evaluate import Evaluation
from dit_accel.convert.recipes import RECIPES, parse_weight, reweighted
from dit_accel.convert.request import LORA_LAYERS, SAMPLINGS, Request, Source
from dit_accel.convert.run import run
from dit_accel.demo.judge import prompt_check
from dit_accel.demo.write_scenes import write_scenes
from dit_accel.embedded import IMAGE, VIDEO
from dit_accel.files import replacing, write_json
from dit_accel.install import denoisers, installed_layers

__all__ = ["MECHANISMS"]

# a tenth of the logits each, of 64×64 tokens beside 40 of text and of 13×16×16: most where a layer cannot do without
# (GNA in that layer alone, a tenth, two samples: the image's loss rose by 33 % for the second double block, by 12 % for
# single blocks 2 and 6, else by 1 to 4 %; the video's by 119 to 200 % for blocks 0, 1, 4 and 6, by 18 to 40 % for 2, 3
# and 5; blocks 7 to 9 were not measured)
_MAIN, _SINGLE, _HOT = r"@\.transformer_blocks\.1\.", r"@single_transformer_blocks\.", r"@blocks\.[0146]\."
MECHANISMS = {
    "image": {
        "sla": "sla:critical=0.03,block_q=8,block_kv=8,tile_order=true;critical=0.36" + _MAIN
        + rf";critical=0.08{_SINGLE}[02]\.;critical=0.07{_SINGLE}6\.",
        "clear": rf"clear:radius=7;radius=26.5{_MAIN};radius=12.5{_SINGLE}[26]\.;radius=8.5{_SINGLE}5\."
        + rf";radius=5.5{_SINGLE}[14]\.;radius=4@\.transformer_blocks\.0\.",
        "llsa": "llsa:block_size=8,topk=12,levels=2;topk=56" + _MAIN,
        "gna": rf"gna:window=12x12;window=38x38{_MAIN};window=20x20{_SINGLE}[26]\.;window=14x14{_SINGLE}5\."
        + rf";window=10x10{_SINGLE}4\.;window=8x8{_SINGLE}1\.;window=6x6@\.transformer_blocks\.0\.",
    },
    "video": {
        "sla": rf"sla:critical=0.03,block_q=8,block_kv=8,tile_order=true;critical=0.18{_HOT};critical=0.09@blocks\.5\.",
        "clear": r"clear:radius=3.3;radius=6.6@blocks\.[16]\.;radius=6@blocks\.[04]\.;radius=4.5@blocks\.5\.",
        "llsa": "llsa:block_size=8,topk=8,levels=2;topk=34" + _HOT,
        "gna": r"gna:window=3x6x6;window=7x10x10@blocks\.[16]\.;window=7x9x9@blocks\.[04]\.;window=5x7x7@blocks\.5\.",
    },
}  # fmt: skip
LEVELS = 8
HELD_OUT_SEED = 20261125


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=tuple(MECHANISMS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pipeline", type=Path, help="default the embedded one")
    parser.add_argument("--only", action="append", choices=tuple(MECHANISMS["image"]), help="of the mechanisms")
    parser.add_argument("--attn", action="append", metavar="SPEC", default=[], help="instead of its mechanism's here")
    parser.add_argument("--recipe", default="clear")
    parser.add_argument("--train", default="lora")
    parser.add_argument("--lora-layers", default="attention", choices=LORA_LAYERS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--timestep-sampling", default="uniform", choices=SAMPLINGS, help="the loss is over even levels"
    )
    parser.add_argument("--loss-weight", action="append", metavar="NAME=WEIGHT", type=parse_weight, default=[])
    parser.add_argument("--cuda-graph", action="store_true")
    parser.add_argument("--caption-dropout", type=float, default=0.0, metavar="SHARE")
    parser.add_argument("--scenes", type=int, default=2000, help="to train on")
    parser.add_argument("--held-out", type=int, default=64, help="scenes for the loss")
    parser.add_argument("--captions", type=int, default=1000, help="to draw and check")
    parser.add_argument("--captions-before", type=int, help="of them, by the untrained student; default all")
    parser.add_argument("--pictures", type=int, default=4, help="to show")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed-precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--results", type=Path, help="file that rows are added to; default quality.json in --out")
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
        str(pipeline), args.out / "scenes", embedded.prompts, args.scenes, None, None, None, (), None, args.seed,
        args.device, args.out,
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
            (folder / "samples").symlink_to(Path("..") / "samples")  # the same for all
        run(_request(args, replace(source, out=folder), specs[name]), console)
        evaluation = evaluation or Evaluation(
            held_out, LEVELS, args.pictures, console, partial(_check, held_out.out), args.captions,
            args.mixed_precision, LEVELS,
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
    """A row of the table: a mechanism before training, and after."""
    folder = args.out / name
    before = evaluation.measure(parse_attention(text), folder / "before", args.captions_before)
    after = evaluation.measure(str(folder), folder / "report")
    write_json(folder / "report/evaluate.json", {**evaluation.about(), **after})
    write_card(folder)
    told = json.loads((folder / "convert.json").read_text())
    parameters = sum(p.numel() for p in evaluation.teacher.parameters())
    return {
        "teacher": f"{args.kind}, {parameters / 1e6:.1f} M", "mechanism": name, "training": _training(args),
        "attention": text,
        "before": before, "after": after, "steps": told["steps"], "batch": args.batch, "recipe": args.recipe,
        "lr": args.lr, "rank": args.rank if args.train == "lora" else None, "scenes": args.scenes,
        "trained_parameters": told["trained_parameters"], "last_losses": told["history"][-1],
        "samples": len(evaluation.samples), "call": evaluation.call,
        "bytes": (folder / "dit_accel.safetensors").stat().st_size, "status": "complete",
    }  # fmt: skip


def _training(args: argparse.Namespace) -> str:
    """The losses of the last stage, and the noise levels that were drawn."""
    stage = reweighted(RECIPES[args.recipe], dict(args.loss_weight)).stages[-1]
    losses = [name for name in ("flow", "prediction", "attention", "matching") if stage.weight(name)]
    levels = {"shift": "shifted levels", "uniform": "even levels", "mixed": "mixed levels"}[args.timestep_sampling]
    dropped = f", {args.caption_dropout:.0%} without caption" if args.caption_dropout else ""
    return f"{' + '.join(losses)}, {levels}{dropped}"


def _check(folder: Path, pipe: Any, call: dict[str, Any], count: int, note: Callable[[int], None]) -> list[bool]:
    """The prompt check; the teacher's is kept in a file, since it is the same for all mechanisms."""
    path = folder / f"captions-{count}.json"
    if any(installed_layers(model) for model in denoisers(pipe).values()):
        return prompt_check(pipe, call, count, note)
    if not path.is_file():
        write_json(path, {"right": prompt_check(pipe, call, count, note)})
    return list(json.loads(path.read_text())["right"])


def _write(path: Path, measured: list[Path]) -> None:
    """The rows of these files, and those that are there of other teachers and mechanisms."""
    each = [read_results(file) for file in measured]
    rows = [row for one in each for row in one["rows"]]
    names = {tuple(row[key] for key in KEYS["quality"]) for row in rows}
    earlier = read_results(path)["rows"] if path.is_file() else []
    kept = [row for row in earlier if tuple(row[key] for key in KEYS["quality"]) not in names]
    command = ["python -m dit_accel.demo.convert_embedded", *sys.argv[1:]]
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
    """A row a prompt: the teacher's, then each mechanism's before and after training; in half size, with headings."""
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
