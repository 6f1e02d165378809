"""Stable Diffusion 1.5, 2.1 and XL: self-attention inside each ``Transformer2DModel``, at its own resolution."""

from collections.abc import Mapping
from typing import Any

from diffusers import Transformer2DModel, UNet2DConditionModel
from torch import nn

from ..layout import TokenLayout
from ..site import Site, self_attention_layers

MODELS = (UNet2DConditionModel,)


def read(transformer: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    return TokenLayout(tuple(arguments["hidden_states"].shape[-2:]))  # (B, C, H, W), one token a place


def sites(model: nn.Module) -> list[Site]:
    owners = [name for name, module in model.named_modules() if isinstance(module, Transformer2DModel)]
    return [Site(owner, read, self_attention_layers(model, owner)) for owner in owners]
