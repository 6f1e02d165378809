"""Where a conversion stands: one file, whole or not at all, and the one before it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..files import replacing

__all__ = ["NAME", "load_checkpoint", "save_checkpoint"]

NAME = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write the state; the checkpoint that was there is kept as ``checkpoint.previous.pt``.

    Raises: OSError: it could not be written (a full disk); the checkpoints that were there still are.
    """
    path = folder / NAME
    with replacing(path) as temporary:
        torch.save(state, temporary)
        if path.exists():
            os.replace(path, path.with_suffix(".previous.pt"))


def load_checkpoint(folder: Path, mapped: bool = False) -> dict[str, Any] | None:
    """The latest state that can be read; None if there is none.

    Args: mapped: values are read when they are used, so that several processes do not hold all of it each.
    Raises: ValueError: files are there, and none can be read.
    """
    paths = [path for path in (folder / NAME, (folder / NAME).with_suffix(".previous.pt")) if path.is_file()]
    failed = None
    for path in paths:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # torch raises many kinds for a file that is no checkpoint
            failed = f"{path}: {error}"
    if failed is not None:
        raise ValueError(f"no checkpoint can be read ({failed}); remove {folder} to begin anew")
    return None
