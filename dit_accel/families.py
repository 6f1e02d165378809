"""The model families in ``pipelines/``: one short file each, found by looking into the folder.

A family file has ``MODELS``, the denoiser classes; ``attention_groups(model) -> list[AttentionGroup]``, the layers and
the function that reads their layout; and ``token_box(pipe, model) -> TokenBox``, the picture sizes that fit.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType

from torch import nn

from . import pipelines
from .attention_group import AttentionGroup

__all__ = ["attention_groups_of", "family_of", "supported_models"]


@functools.cache
def _families() -> tuple[ModuleType, ...]:
    names = sorted(info.name for info in pkgutil.iter_modules(pipelines.__path__))
    return tuple(importlib.import_module(f"{pipelines.__name__}.{name}") for name in names)


def supported_models() -> list[str]:
    """Class names of the denoisers whose token layout is known."""
    return sorted(model.__name__ for family in _families() for model in family.MODELS)


def family_of(model: nn.Module) -> ModuleType | None:
    """The file in ``pipelines/`` for this denoiser, by class; None where there is none."""
    return next((family for family in _families() if isinstance(model, family.MODELS)), None)


def attention_groups_of(model: nn.Module) -> list[AttentionGroup]:
    """The groups of a known denoiser that have attention layers.

    Raises: ValueError: an unknown model, with what is supported and how to pass a layout by hand.
    """
    family = family_of(model)
    if family is None:
        raise ValueError(
            f"dit_accel does not know where the tokens of {type(model).__name__} are. Known: "
            f"{', '.join(supported_models())}. For any other model with softmax self-attention, pass the layout by "
            "hand: dit_accel.set_attn_processor(model, processor, layout=dit_accel.TokenLayout(grid=(H, W), before="
            "text_tokens)), or a function (model, arguments) -> TokenLayout, where arguments are those of the model's "
            "forward() by name"
        )
    return [group for group in family.attention_groups(model) if group.layers]
