"""The two embedded pipelines, and default call arguments from a pipeline's ``defaults.json``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import BadInput
from .version import __version__

__all__ = ["IMAGE", "OTHER_PROMPTS", "VIDEO", "Embedded", "prompts_of", "read_defaults", "select_embedded"]

_PACKAGE = "dit_accel_demo"  # of the wheel dit-accel-demo, see demo/pyproject.toml
_CLONE = Path(__file__).parents[1] / "demo"


@dataclass(frozen=True)
class Embedded:
    """An embedded pipeline.

    Args:
        kind: name of its folder, "image" or "video".
        prompts: captions of held-out scenes, which are not in the training data.
        data: folder of the pipelines and conversions; None = that of the clone or of the wheel dit-accel-demo.
    """

    kind: str
    prompts: tuple[str, ...]
    data: Path | None = None

    @property
    def folder(self) -> Path:
        """Pipeline folder for ``from_pretrained``.

        Raises: BadInput: the embedded pipelines are not installed.
        """
        return (self.data or _data_folder()) / self.kind

    @property
    def conversions(self) -> Path:
        """Folder with one subfolder for ``load_attention`` per mechanism the pipeline was converted to.

        Raises: BadInput: the embedded pipelines are not installed.
        """
        return (self.data or _data_folder()) / "conversions" / self.kind

    def students(self, mechanisms: Iterable[str]) -> list[str]:
        """For each mechanism, the folder of its conversion if there is one, else its name."""
        folders = {name: self.conversions / name for name in mechanisms}
        return [str(folder) if folder.is_dir() else name for name, folder in folders.items()]


IMAGE = Embedded(
    kind="image",
    prompts=(
        "a small white square at the top and an orange checkered circle at the bottom on a green background",
        "three yellow triangles in a row on an orange background",
    ),
)

VIDEO = Embedded(
    kind="video",
    prompts=(
        "a white cross at the left moving up and a purple circle at the right standing still on a red background",
        "two blue squares moving right on a gray background",
    ),
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


def prompts_of(source: str) -> tuple[str, ...]:
    """Default prompts of a pipeline: held-out captions of an embedded one, else ``OTHER_PROMPTS``."""
    for embedded in (IMAGE, VIDEO):
        try:
            if source == str(embedded.folder):
                return embedded.prompts
        except BadInput:  # not installed
            break
    return OTHER_PROMPTS


@cache
def _data_folder() -> Path:
    """Folder of the embedded pipelines: ``demo`` of a clone, else the package of the wheel dit-accel-demo.

    Raises: BadInput: neither holds both pipelines.
    """
    found = find_spec(_PACKAGE)  # does not import it
    folders = [_CLONE, *map(Path, (found and found.submodule_search_locations) or ())]
    for folder in folders:
        if all((folder / kind / "model_index.json").is_file() for kind in ("image", "video")):
            return folder
    searched = " or ".join(map(str, folders))
    raise BadInput(
        f"expected the embedded pipelines of dit-accel-demo {__version__}, got none in {searched}: "
        "pip install 'dit-accel[demo]' (in a clone: pip install ./demo), or give a pipeline of your own"
    )
