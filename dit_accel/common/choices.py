"""Choices of options as ``Literal`` types, and checks of option values with one message for commands and functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal, get_args

__all__ = [
    "Dtype", "LoraLayers", "MixedPrecision", "Order", "Recipe", "Sampling", "SaveDtype", "Schedule", "Train",
    "check_choice", "check_count", "check_positive",
]  # fmt: skip

Recipe = Literal["sla", "clear", "attention-transfer", "linvideo", "lit"]
Train = Literal["new", "attention", "lora", "full"]
LoraLayers = Literal["attention", "blocks"]
Schedule = Literal["constant", "cosine"]
Sampling = Literal["shift", "uniform", "mixed"]
SaveDtype = Literal["float32", "bfloat16", "float16"]
MixedPrecision = Literal["no", "fp16", "bf16"]
Dtype = Literal["float32", "float16", "bfloat16"]
Order = Literal["tokens-first", "heads-first"]


def check_choice(option: str, value: object, choices: Any) -> None:
    """Check that a value is one of the choices of a ``Literal`` type.

    Args: option: name for the message, such as ``--train``.
    Raises: ValueError: it is not; the message suggests the nearest choice.
    """
    known: Sequence[str] = get_args(choices)
    if value in known:
        return
    close = get_close_matches(str(value).lower(), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{option}: expected one of {', '.join(known)}, got {value!r}{hint}")


def check_count(option: str, value: object, least: int = 1, *, optional: bool = False) -> None:
    """Check that a value is an integer of at least ``least``.

    Args: optional: whether None is accepted.
    Raises: TypeError: it is not an integer. ValueError: it is too small.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{option}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{option}: expected an integer of at least {least}, got {value}")


def check_positive(option: str, value: object) -> None:
    """Check that a value is None, or a finite number above 0.

    Raises: TypeError: it is not a number. ValueError: it is out of range.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{option}: expected a number, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{option} must be above 0, got {value}")
