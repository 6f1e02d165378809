"""Training checkpoints of a conversion: the latest and the previous one, each written atomically."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..common.files import replacing

__all__ = ["NAME", "check_steps", "load_checkpoint", "save_checkpoint"]

NAME = "checkpoint.pt"
_ENTRIES: dict[str, Any] = {
    "step": int, "stage": int, "scores": (dict, type(None)), "history": list, "parameters": dict, "optimizer": dict,
    "scaler": (dict, type(None)),
}  # fmt: skip


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write the state to ``checkpoint.pt``; the earlier checkpoint becomes ``checkpoint.previous.pt``.

    Raises: CannotWrite: the file cannot be written (full disk); the earlier checkpoints are unchanged.
    """
    path = folder / NAME
    with replacing(path) as temporary:
        torch.save(state, temporary)
        if path.exists():
            os.replace(path, path.with_suffix(".previous.pt"))


def load_checkpoint(
    folder: Path, mapped: bool = False, tell: Callable[[str], None] = lambda _: None
) -> dict[str, Any] | None:
    """The latest readable state; None if there is no checkpoint.

    Args:
        mapped: map the file into memory, so that several processes do not each hold a copy.
        tell: called with one line of text if the latest checkpoint cannot be read and the previous one can.
    Raises: ValueError: there are checkpoints, and none can be read.
    """
    failed: list[str] = []
    for path in (folder / NAME, (folder / NAME).with_suffix(".previous.pt")):
        if not path.exists():
            continue
        try:
            state = _read(path, mapped)
        except ValueError as error:
            failed.append(str(error))
            continue
        if failed:
            tell(f"{failed[0]}; resuming from {path.name}, of step {state['step']}")
        return state
    if failed:
        raise ValueError(
            f"no checkpoint can be read: {'; '.join(failed)}. Remove these files to start over, or choose another --out"
        )
    return None


def check_steps(folder: Path, done: int, steps: int) -> None:
    """Check that the run has not done more steps than were requested. Raises: ValueError: it has."""
    if done > steps:
        raise ValueError(
            f"the run in {folder} has already done {done} steps, more than --steps {steps}: give --steps {done} or "
            "more, or another --out"
        )


def _read(path: Path, mapped: bool) -> dict[str, Any]:
    """The state in a checkpoint file.

    Raises: ValueError: the file cannot be read, or is not a checkpoint of a conversion.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # torch raises many types for a file that is not a checkpoint
        raise ValueError(f"{path} is damaged, or not a checkpoint") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint of a conversion: expected a dict, got a {type(state).__name__}")
    wrong = [key for key, kind in _ENTRIES.items() if key not in state or not isinstance(state[key], kind)]
    if wrong or len(state["history"]) != state["step"]:
        what = (
            f"{', '.join(wrong)} missing or of a wrong type"
            if wrong
            else f"{len(state['history'])} losses for {state['step']} steps"
        )
        raise ValueError(f"{path} is not a checkpoint of a conversion: {what}")
    return state
