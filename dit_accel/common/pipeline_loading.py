"""Load a diffusers pipeline from a folder or the hub, for the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .errors import BadInput

__all__ = ["load_pipeline"]


def load_pipeline(source: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a pipeline onto a device, without progress bars.

    Raises: BadInput: the pipeline does not exist or cannot be loaded; the message gives the reason.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # hides hints about torchvision, which the commands do not need
    if not Path(source).is_dir() and (source.startswith((".", "~")) or Path(source).is_absolute()):
        raise BadInput(f"there is no folder {source}")
    try:
        pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, TypeError, ImportError, AttributeError, KeyError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BadInput(f"cannot load a diffusers pipeline from {source}: {first}") from error
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe
