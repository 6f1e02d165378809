"""Settings of a conversion: the source of its samples and the training options.

Both classes check their values. Messages name the options of the command: ``lr_schedule`` is ``--lr-schedule``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.bundled import OTHER_PROMPTS, select_embedded
from ..common.choices import (
    LoraLayers,
    MixedPrecision,
    Recipe,
    Sampling,
    SaveDtype,
    Schedule,
    Train,
    check_choice,
    check_count,
    check_positive,
)
from ..comparison.sizes import Size, parse_size
from ..mechanisms.attn_spec import AttentionSpec
from .recipes.recipe import RECIPES

__all__ = ["Request", "Source", "default_precision", "make_source"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Pipeline and data that samples are made from.

    Attributes:
        pipeline: folder or hub id.
        out: output folder.
        data: folder or shards of pictures or clips with captions; None: the pipeline draws ``samples`` samples from
            ``prompts``.
        height, width, frames: the size if ``sizes`` is empty; None: the pipeline's default.
        sizes: size buckets.
        fps: frame rate of clips; None: the pipeline's default.
        seed: seed of the samples and of the training.
        device: "cpu", or None for the device that accelerate selects.

    Raises: TypeError, ValueError: a value of the wrong type or out of range, or options that exclude each other.
    """

    pipeline: str
    out: Path
    data: Path | None = None
    prompts: tuple[str, ...] = ()
    samples: int = 64
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    sizes: tuple[Size, ...] = ()
    fps: float | None = None
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        check_count("--samples", self.samples)
        check_count("--seed", self.seed, 0)
        for name in ("height", "width", "frames"):
            check_count(f"--{name}", getattr(self, name), optional=True)
        if self.sizes and any(length is not None for length in (self.height, self.width, self.frames)):
            raise ValueError("give --size, or --height, --width and --frames, not both")
        check_positive("--fps", self.fps)
        if self.fps is not None and self.data is None:
            raise ValueError(
                "--fps applies to clips given with --data: clips of the teacher have the pipeline's frame rate"
            )
        if self.device not in (None, "cpu"):
            raise ValueError(f"--device takes cpu, got {self.device!r}; without --device, accelerate selects the GPU")


def make_source(
    *,
    out: Path,
    pipeline: str | None,
    video: bool,
    data: Path | None,
    data_free: bool,
    prompts: Path | Sequence[str] | None,
    size: Sequence[str],
    **rest: Any,
) -> Source:
    """Source from the options of convert and evaluate.

    Args:
        prompts: file with one prompt per line, or the prompts; None: the pipeline's default prompts.
        size: texts for :func:`.sizes.parse_size`.
        rest: other attributes of :class:`Source`.
    Raises: TypeError, ValueError: as :class:`Source`, or a missing file.
    """
    embedded = select_embedded(pipeline, video)
    if (data is None) == (not data_free):
        raise ValueError("give --data with a folder or .tar shards, or --data-free")
    default = OTHER_PROMPTS if pipeline is not None else embedded.prompts
    return Source(
        pipeline=pipeline or str(embedded.folder), out=out, data=data,
        prompts=default if prompts is None else _read_prompts(prompts), sizes=tuple(map(parse_size, size)), **rest,
    )  # fmt: skip


def _read_prompts(prompts: Path | Sequence[str]) -> tuple[str, ...]:
    """Prompts of a file, or of a sequence, without blank ones. Raises: ValueError: there are none."""
    lines: Sequence[str]
    if isinstance(prompts, Path):
        if not prompts.is_file():
            raise ValueError(f"--prompts: there is no file {prompts}")
        lines = prompts.read_text(encoding="utf-8").splitlines()
    else:
        lines = prompts
    texts = tuple(filter(None, map(str.strip, lines)))
    if not texts:
        where = f"{prompts} contains" if isinstance(prompts, Path) else "there is"
        raise ValueError(f"--prompts: {where} no prompt; write one per line")
    return texts


def default_precision(device: str | None) -> MixedPrecision:
    """Default of ``--mixed-precision``: bf16 on a GPU, else no."""
    return "bf16" if torch.cuda.is_available() and device != "cpu" else "no"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Settings of a conversion.

    Attributes:
        train: trained parameters; None: the recipe's.
        rank: rank of LoRA.
        batch: samples per process and micro-batch. accumulate: micro-batches per step.
        lr: learning rate; None: the recipe's. warmup: steps of linear warm-up in each stage.
        convert_layers: number of layers that a selecting recipe converts; None: the recipe's default.
        lora_layers: modules whose linear layers get a LoRA.
        schedule: learning-rate schedule of each stage after the warm-up; "cosine" ends at 0.
        save_dtype: dtype of the saved file.
        sampling: distribution of noise levels, see :class:`.noise.NoiseProcess`.
        weights: loss weights by name that replace the recipe's.
        cuda_graph: whether the gradients of a batch are captured as a CUDA graph and replayed.
        caption_dropout: share of samples that are trained with an empty caption.

    Raises: TypeError, ValueError: a value of the wrong type or out of range.
    """

    source: Source
    attention: AttentionSpec
    recipe: Recipe
    train: Train | None = None
    rank: int = 16
    steps: int = 1000
    batch: int = 4
    accumulate: int = 1
    lr: float | None = None
    warmup: int = 50
    mixed_precision: MixedPrecision = "no"
    gradient_checkpointing: bool = False
    save_every: int = 200
    sample_every: int = 0
    tracker: str | None = None
    convert_layers: int | None = None
    lora_layers: LoraLayers = "attention"
    schedule: Schedule = "constant"
    save_dtype: SaveDtype = "float32"
    sampling: Sampling = "shift"
    weights: tuple[tuple[str, float], ...] = ()
    cuda_graph: bool = False
    caption_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_choice("--recipe", self.recipe, Recipe)
        if self.train is not None:
            check_choice("--train", self.train, Train)
        check_choice("--lora-layers", self.lora_layers, LoraLayers)
        check_choice("--mixed-precision", self.mixed_precision, MixedPrecision)
        check_choice("--save-dtype", self.save_dtype, SaveDtype)
        check_choice("--timestep-sampling", self.sampling, Sampling)
        check_choice("--lr-schedule", self.schedule, Schedule)
        for name in ("rank", "steps", "batch", "accumulate", "save_every"):
            check_count(f"--{name.replace('_', '-')}", getattr(self, name))
        check_count("--warmup", self.warmup, 0)
        check_count("--sample-every", self.sample_every, 0)
        check_count("--convert-layers", self.convert_layers, optional=True)
        check_positive("--lr", self.lr)
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"--caption-dropout takes a share from 0 to below 1, got {self.caption_dropout}")

    def fingerprint(self) -> dict[str, Any]:
        """Settings that must be equal for a run to resume an earlier one, as JSON values."""
        fixed = asdict(self)
        fixed |= fixed.pop("source")
        for free in ("out", "save_every", "sample_every", "tracker", "device", "save_dtype", "cuda_graph"):
            del fixed[free]
        if len(RECIPES[self.recipe].stages) == 1 and self.schedule == "constant":  # else the schedule depends on it
            del fixed["steps"]
        exceptions = {layers: dict(options) for layers, options in self.attention.exceptions}
        fixed["attention"] = {"name": self.attention.name, "options": dict(self.attention.options)}
        fixed["attention"] |= {"exceptions": exceptions} if exceptions else {}
        return {key: str(value) if isinstance(value, Path) else _plain(value) for key, value in fixed.items()}


def _plain(value: Any) -> Any:
    """The value as it is after a round trip through JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
