"""What a model family tells the library: which layers attend over a grid, and how to read it off a forward call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .layout import TokenLayout

__all__ = ["AttentionGroup", "GivenLayout", "ReadLayout", "TokenBox", "is_self_attention", "self_attention_layers"]

ReadLayout = Callable[[nn.Module, Mapping[str, Any]], TokenLayout]


@dataclass(frozen=True)
class AttentionGroup:
    """Self-attention layers that share a token layout, and the module whose forward arguments tell it.

    Args:
        owner: dotted name of that module inside the denoiser, ``""`` for the denoiser itself.
        read: ``(owner module, its forward arguments by name) -> TokenLayout``; called before every forward.
        layers: dotted names of the attention modules inside the denoiser.
    """

    owner: str
    read: ReadLayout
    layers: Sequence[str]


@dataclass(frozen=True)
class GivenLayout:
    """A layout given by hand, for :attr:`AttentionGroup.read`: a ``TokenLayout``, or a function of its arguments."""

    layout: TokenLayout | ReadLayout

    def __post_init__(self) -> None:
        if not isinstance(self.layout, TokenLayout) and not callable(self.layout):
            raise TypeError(
                "layout must be a TokenLayout or a function (model, arguments) -> TokenLayout, got "
                f"{type(self.layout).__name__}"
            )

    def __call__(self, owner: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
        return self.layout if isinstance(self.layout, TokenLayout) else self.layout(owner, arguments)


@dataclass(frozen=True)
class TokenBox:
    """Pixels (and frames) that one token stands for, and what the sizes must be multiples of.

    Args:
        side: height and width in pixels of the patch behind one token.
        multiple: what height and width must be multiples of.
        frames: a clip's frames are this many times a whole number, plus one; None for pictures.
        patch_frames: latent frames in one token.
    """

    side: tuple[int, int]
    multiple: tuple[int, int]
    frames: int | None = None
    patch_frames: int = 1


def is_self_attention(module: nn.Module) -> bool:
    """True for a diffusers attention module (one that has a processor) that does not take its keys from elsewhere."""
    return getattr(module, "processor", None) is not None and not getattr(module, "is_cross_attention", False)


def self_attention_layers(model: nn.Module, inside: str = "") -> list[str]:
    """Names, in the model, of the self-attention modules below the module named ``inside``."""
    prefix = f"{inside}." if inside else ""
    return [name for name, module in model.named_modules() if name.startswith(prefix) and is_self_attention(module)]
