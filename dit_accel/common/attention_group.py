"""Description of a model family: the attention layers, and the function that reads their layout from a forward call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..layout import TokenLayout

__all__ = ["AttentionGroup", "GivenLayout", "ReadLayout", "TokenBox", "is_self_attention", "self_attention_layers"]

ReadLayout = Callable[[nn.Module, Mapping[str, Any]], TokenLayout]


@dataclass(frozen=True)
class AttentionGroup:
    """Self-attention layers with one token layout, which is read from the forward arguments of ``owner``.

    Args:
        owner: dotted name of a module inside the denoiser, ``""`` for the denoiser itself.
        read: ``(owner module, its forward arguments by name) -> TokenLayout``; called before each forward.
        layers: dotted names of the attention modules inside the denoiser.
    """

    owner: str
    read: ReadLayout
    layers: Sequence[str]


@dataclass(frozen=True)
class GivenLayout:
    """Layout passed by the user, for :attr:`AttentionGroup.read`: a ``TokenLayout``, or a function that returns one."""

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
    """Size of one token in pixels and frames, and the multiples that image and video sizes must have.

    Args:
        side: height and width of a token in pixels.
        multiple: height and width of an image must be multiples of these.
        frames: the number of frames of a video must be a multiple of this, plus one; None for images.
        patch_frames: latent frames per token.
    """

    side: tuple[int, int]
    multiple: tuple[int, int]
    frames: int | None = None
    patch_frames: int = 1


def is_self_attention(module: nn.Module) -> bool:
    """Return whether the module is a diffusers attention module (it has a processor) and not cross-attention."""
    return getattr(module, "processor", None) is not None and not getattr(module, "is_cross_attention", False)


def self_attention_layers(model: nn.Module, inside: str = "") -> list[str]:
    """Return the dotted names of the model's self-attention modules below the module named ``inside``."""
    prefix = f"{inside}." if inside else ""
    return [name for name, module in model.named_modules() if name.startswith(prefix) and is_self_attention(module)]
