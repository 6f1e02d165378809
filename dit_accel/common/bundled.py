"""The two small pipelines in the package, and default call arguments from a pipeline's ``defaults.json``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["IMAGE", "OTHER_PROMPTS", "VIDEO", "Embedded", "read_defaults"]

_DEMO = Path(__file__).parents[1] / "demo"


@dataclass(frozen=True)
class Embedded:
    """An embedded pipeline of the package.

    Args:
        folder: pipeline folder for ``from_pretrained``.
        prompts: captions of held-out scenes, which are not in the training data.
        conversions: folder with one subfolder for ``load_attention`` per mechanism the pipeline was converted to.
    """

    folder: Path
    prompts: tuple[str, ...]
    conversions: Path

    def students(self, mechanisms: Iterable[str]) -> list[str]:
        """For each mechanism, the folder of its conversion if there is one, else its name."""
        folders = {name: self.conversions / name for name in mechanisms}
        return [str(folder) if folder.is_dir() else name for name, folder in folders.items()]


IMAGE = Embedded(
    folder=_DEMO / "image",
    prompts=(
        "a small white square at the top and an orange checkered circle at the bottom on a green background",
        "three yellow triangles in a row on an orange background",
    ),
    conversions=_DEMO / "conversions/image",
)

VIDEO = Embedded(
    folder=_DEMO / "video",
    prompts=(
        "a white cross at the left moving up and a purple circle at the right standing still on a red background",
        "two blue squares moving right on a gray background",
    ),
    conversions=_DEMO / "conversions/video",
)

# default prompts of all other pipelines
OTHER_PROMPTS = (
    "a lighthouse on a rocky coast at dusk, waves breaking, photograph",
    "a red bicycle leaning against a yellow wall covered in ivy",
)


def select_embedded(pipeline: str | None, video: bool) -> Embedded:
    """The embedded pipeline that is used if no pipeline is given.

    Raises: ValueError: both a pipeline and ``video`` are given.
    """
    if video and pipeline is not None:
        raise ValueError("give --pipeline or --video, not both: --video selects the embedded video pipeline")
    return VIDEO if video else IMAGE


def read_defaults(source: str) -> dict[str, Any]:
    """Call arguments from ``defaults.json`` in a pipeline folder; empty if there is no such file.

    Raises: ValueError: the file does not hold a JSON object.
    """
    file = Path(source) / "defaults.json"
    if not file.is_file():
        return {}
    try:
        defaults = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(defaults, dict):
        raise ValueError(f"{file} must hold a JSON object of call arguments, got {type(defaults).__name__}")
    return defaults
