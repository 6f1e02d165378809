"""Arguments of a mechanism's computation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..layout import TokenLayout

__all__ = ["AttentionInputs"]


class AttentionInputs(NamedTuple):
    """Tensors, token layout and scale of an attention call.

    Attributes:
        query, key, value: (B, H, S, D), one dtype and device, any strides.
        key_mask: (B, S) bool, True = attend; masked keys may hold NaN. None: all keys are valid.
        learned: the learned tensors, in the order of the processor's ``learned``; None for one that is not given.
        layout: position of the grid in the sequence.
        scale: factor on the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    learned: tuple[Tensor | None, ...]
    layout: TokenLayout
    scale: float
