"""Sliders of a mechanism in the demo app."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from ._options import option_fields

__all__ = ["Control", "join_axes", "option_controls"]


@dataclass(frozen=True)
class Control:
    """A slider: limits, initial value and step. Integers if the step is an int."""

    name: str
    label: str
    low: float
    high: float
    value: float
    step: float
    help: str = ""


def option_controls(kind: type) -> tuple[Control, ...]:
    """Sliders for the numeric options that have a default: shares from 0.01 to 1, other numbers up to four times the
    default."""
    found = []
    for field in option_fields(kind):
        value = field.default
        if value is MISSING or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        label = field.name.replace("_", " ").capitalize()
        if isinstance(value, int):
            found.append(Control(field.name, label, 1, max(8, 4 * value), value, 1))
        elif 0 < value <= 1:
            found.append(Control(field.name, label, 0.01, 1.0, value, 0.01))
        else:
            found.append(Control(field.name, label, 0.0, max(1.0, 4 * value), value, 0.1))
    return tuple(found)


def join_axes(values: Mapping[str, Any], name: str, axes: int) -> Any:
    """One value per axis from the sliders ``name`` (space) and ``name_time``; one for all axes of a picture."""
    space = values[name]
    return (values[f"{name}_time"], space, space) if axes == 3 else space
