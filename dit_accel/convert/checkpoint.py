"""Where a conversion stands: one file, whole or not at all, and the one before it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..files import replacing

__all__ = ["NAME", "check_steps", "load_checkpoint", "save_checkpoint"]

NAME = "checkpoint.pt"
_HELD: dict[str, Any] = {
    "step": int, "stage": int, "scores": (dict, type(None)), "history": list, "parameters": dict, "optimizer": dict,
    "scaler": (dict, type(None)),
}  # fmt: skip


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write the state; the checkpoint that was there is kept as ``checkpoint.previous.pt``.

    Raises: CannotWrite: it could not be written (a full disk); the checkpoints that were there still are.
    """
    path = folder / NAME
    with replacing(path) as temporary:
        torch.save(state, temporary)
        if path.exists():
            os.replace(path, path.with_suffix(".previous.pt"))


def load_checkpoint(
    folder: Path, mapped: bool = False, tell: Callable[[str], None] = lambda _: None
) -> dict[str, Any] | None:
    """The latest state that can be read; None if there is none.

    Args:
        mapped: values are read when they are used, so that several processes do not hold all of it each.
        tell: called with a line of text if a checkpoint cannot be read and the one before it can.
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
            f"no checkpoint can be read: {'; '.join(failed)}. Remove what is named to begin anew, or choose another "
            "--out"
        )
    return None


def check_steps(folder: Path, done: int, steps: int) -> None:
    """Raises: ValueError: a run has done more steps than are asked for."""
    if done > steps:
        raise ValueError(
            f"the run in {folder} has already done {done} steps, more than --steps {steps}: give --steps {done} or "
            "more, or another --out"
        )


def _read(path: Path, mapped: bool) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        raise ValueError(f"{path} is damaged, or no checkpoint") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no checkpoint of a conversion: it holds a {type(state).__name__}")
    wrong = [key for key, kind in _HELD.items() if key not in state or not isinstance(state[key], kind)]
    if wrong or len(state["history"]) != state["step"]:
        what = f"without {', '.join(wrong)}" if wrong else "with another number of losses than steps"
        raise ValueError(f"{path} is no checkpoint of a conversion: {what}")
    return state
