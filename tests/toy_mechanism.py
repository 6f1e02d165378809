"""A mechanism from outside the package, in one file: each query attends to every period-th key."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import dit_accel


@dit_accel.register_processor
@dataclass(frozen=True, kw_only=True)
class CombAttnProcessor(dit_accel.AcceleratedAttnProcessor):
    """Attention to every ``period``-th grid token, counted from the query, and to all global tokens.

    Args:
        period: distance between the keys of a query, in tokens.
    """

    period: int = 4

    name: ClassVar[str] = "comb"
    label: ClassVar[str] = "Comb"
    summary: ClassVar[str] = "every n-th token"

    def check(self):
        if not isinstance(self.period, int) or self.period < 1:
            raise ValueError(f"period must be an integer of at least 1, got {self.period!r}")

    def fit(self, layout):
        return replace(self, period=min(self.period, layout.grid_len))

    def visible(self, layout):
        """Mask of the keys that each query attends to, (S, S)."""
        place = torch.arange(layout.seq_len)
        on_grid = (place >= layout.before) & (place < layout.before + layout.grid_len)
        same = (place[:, None] - place) % self.period == 0
        return same | ~on_grid | ~on_grid[:, None]

    def count_logits(self, layout):
        return float(self.visible(layout).sum())

    def compute(self, backend, inputs):
        query, key, value, key_mask, _, layout, scale = inputs
        logits = (query @ key.mT * scale).masked_fill(~self.visible(layout).to(query.device), -torch.inf)
        if key_mask is not None:
            logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
        return torch.softmax(logits, -1).nan_to_num() @ value
