"""Discovery of the model families: every module in ``pipelines/`` is one family.

A family module defines ``MODELS``, the denoiser classes; ``attention_groups(model) -> list[AttentionGroup]``, the
layers and the function that reads their layout; and ``token_box(pipe, model) -> TokenBox``, the supported image sizes.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType

from torch import nn

from .. import pipelines
from ..common.attention_group import AttentionGroup

__all__ = ["attention_groups_of", "family_of", "supported_models"]


@functools.cache
def _families() -> tuple[ModuleType, ...]:
    names = sorted(info.name for info in pkgutil.iter_modules(pipelines.__path__))
    return tuple(importlib.import_module(f"{pipelines.__name__}.{name}") for name in names)


def supported_models() -> list[str]:
    """Return the class names of the denoisers with a built-in token layout."""
    return sorted(model.__name__ for family in _families() for model in family.MODELS)


def family_of(model: nn.Module) -> ModuleType | None:
    """Return the module in ``pipelines/`` for the class of this denoiser; None if there is none."""
    return next((family for family in _families() if isinstance(model, family.MODELS)), None)


def attention_groups_of(model: nn.Module) -> list[AttentionGroup]:
    """Return the attention groups of a supported denoiser, without empty ones.

    Raises: ValueError: an unsupported model; the message lists the supported ones and shows how to pass a layout.
    """
    family = family_of(model)
    if family is None:
        raise ValueError(
            f"dit_accel has no token layout for {type(model).__name__}; it has one for "
            f"{', '.join(supported_models())}. For any other model with softmax self-attention, pass a layout: "
            "dit_accel.set_attn_processor(model, processor, layout=dit_accel.TokenLayout(grid=(H, W), before="
            "text_tokens)), or a function (model, arguments) -> TokenLayout; arguments are those of the model's "
            "forward() by name"
        )
    return [group for group in family.attention_groups(model) if group.layers]
