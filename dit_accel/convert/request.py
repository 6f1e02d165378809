"""What a conversion is asked to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..attn_spec import AttentionSpec
from ..compare.sizes import Size
from .recipes import RECIPES

__all__ = ["DTYPES", "LORA_LAYERS", "SAMPLINGS", "SCHEDULES", "TRAINABLE", "Request", "Source"]

TRAINABLE = ("new", "attention", "lora", "full")
LORA_LAYERS = ("attention", "blocks")
SAMPLINGS = ("shift", "uniform", "mixed")
SCHEDULES = ("constant", "cosine")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Source:
    """Where samples come from. ``pipeline``: folder or hub id. ``data``: folder or shards of pictures or clips with
    captions; None = the pipeline draws ``samples`` of them itself from ``prompts``. ``sizes``: buckets; none = one, of
    ``height``, ``width`` and ``frames``, None = the pipeline's own. ``fps``: of clips. ``out``: where everything goes.
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
    """A conversion. ``batch``: samples a process and step. ``lr``, ``train``: None = the recipe's. rank: of LoRA.
    lora_layers: linear layers of what have one. convert_layers: so many layers are chosen; None = the recipe's number.
    schedule: of the learning rate after its warm-up, in each stage: "cosine" ends at 0. save_dtype: of the file.
    sampling: of noise levels, as :class:`.noise.NoiseProcess` has it. weights: of losses, by name, instead of the
    recipe's. cuda_graph: whether the gradients of a batch are captured, and replayed. caption_dropout: share of samples
    that are trained on with an empty caption."""

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
        """What a run must have in common with the one that it goes on with."""
        fixed = asdict(self)
        fixed |= fixed.pop("source")
        for free in ("out", "save_every", "sample_every", "tracker", "device", "save_dtype", "cuda_graph"):
            del fixed[free]
        if len(RECIPES[self.recipe].stages) == 1 and self.schedule == "constant":  # else the end is known beforehand
            del fixed["steps"]
        exceptions = {layers: dict(options) for layers, options in self.attention.exceptions}
        fixed["attention"] = {"name": self.attention.name, "options": dict(self.attention.options)}
        fixed["attention"] |= {"exceptions": exceptions} if exceptions else {}
        return {key: str(value) if isinstance(value, Path) else _plain(value) for key, value in fixed.items()}


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
