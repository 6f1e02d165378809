"""Attention calls of real models, as which a mechanism is measured by ``dit-accel bench``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..layout import TokenLayout

__all__ = ["FLUX_4096", "HUNYUAN_720P", "WAN_480P", "WAN_720P", "Workload"]

WAN_480P = TokenLayout((21, 30, 52))
WAN_720P = TokenLayout((21, 45, 80))
HUNYUAN_720P = TokenLayout((30, 48, 80))
FLUX_4096 = TokenLayout((256, 256), before=512)


@dataclass(frozen=True)
class Workload:
    """An attention call with options of a mechanism.

    Args:
        title: for tables.
        goals: speed-up over dense attention to reach, by benchmark: "forward", "backward" or "scaling" (both over
            growing sizes); None = measured without a goal.
        options: of the mechanism.
    """

    name: str
    title: str
    heads: int
    head_dim: int
    layout: TokenLayout
    options: Mapping[str, Any]
    goals: Mapping[str, float | None] = field(default_factory=lambda: {"forward": None})
