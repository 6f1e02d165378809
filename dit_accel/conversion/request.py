"""Settings of a conversion: the source of its samples and the training options."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..comparison.sizes import Size
from ..mechanisms.attn_spec import AttentionSpec
from .recipes.recipe import RECIPES

__all__ = ["DTYPES", "LORA_LAYERS", "SAMPLINGS", "SCHEDULES", "TRAINABLE", "Request", "Source"]

TRAINABLE = ("new", "attention", "lora", "full")
LORA_LAYERS = ("attention", "blocks")
SAMPLINGS = ("shift", "uniform", "mixed")
SCHEDULES = ("constant", "cosine")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Source:
    """Pipeline and data that samples are made from.

    Attributes:
        pipeline: folder or hub id.
        data: folder or shards of pictures or clips with captions; None: the pipeline draws ``samples`` samples from
            ``prompts``.
        height, width, frames: the size if ``sizes`` is empty; None: the pipeline's default.
        sizes: size buckets.
        fps: frame rate of clips; None: the pipeline's default.
        seed: seed of the samples and of the training.
        device: "cpu", or None for the device that accelerate selects.
        out: output folder.
    """

    pipeline: str
    data: Path | None
    prompts: tuple[str, ...]
    samples: int
    height: int | None
    width: int | None
    frames: int | None
    sizes: tuple[Size, ...]
    fps: float | None
    seed: int
    device: str | None
    out: Path


@dataclass(frozen=True)
class Request:
    """Settings of a conversion.

    Attributes:
        train: trained parameters, one of ``TRAINABLE``; None: the recipe's.
        rank: rank of LoRA.
        batch: samples per process and micro-batch. accumulate: micro-batches per step.
        lr: learning rate; None: the recipe's. warmup: steps of linear warm-up in each stage.
        convert_layers: number of layers that a selecting recipe converts; None: the recipe's default.
        lora_layers: modules whose linear layers get a LoRA, one of ``LORA_LAYERS``.
        schedule: learning-rate schedule of each stage after the warm-up; "cosine" ends at 0.
        save_dtype: dtype of the saved file.
        sampling: distribution of noise levels, see :class:`.noise.NoiseProcess`.
        weights: loss weights by name that replace the recipe's.
        cuda_graph: whether the gradients of a batch are captured as a CUDA graph and replayed.
        caption_dropout: share of samples that are trained with an empty caption.
    """

    source: Source
    attention: AttentionSpec
    recipe: str
    train: str | None
    rank: int
    steps: int
    batch: int
    accumulate: int
    lr: float | None
    warmup: int
    mixed_precision: str
    gradient_checkpointing: bool
    save_every: int
    sample_every: int
    tracker: str | None
    convert_layers: int | None = None
    lora_layers: str = "attention"
    schedule: str = "constant"
    save_dtype: str = "float32"
    sampling: str = "shift"
    weights: tuple[tuple[str, float], ...] = ()
    cuda_graph: bool = False
    caption_dropout: float = 0.0

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
