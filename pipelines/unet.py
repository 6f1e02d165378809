"""Stable Diffusion 1.5, 2.1 and XL: self-attention inside each ``Transformer2DModel``, at its own resolution."""

import math
from collections.abc import Mapping
from typing import Any

from diffusers import Transformer2DModel, UNet2DConditionModel
from torch import nn

from dit_accel.common.attention_group import AttentionGroup, TokenBox, self_attention_layers
from dit_accel.layout import TokenLayout

MODELS = (UNet2DConditionModel,)


def read(transformer: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    return TokenLayout(tuple(arguments["hidden_states"].shape[-2:]))  # (B, C, H, W), one token per position


def attention_groups(model: nn.Module) -> list[AttentionGroup]:
    owners = [name for name, module in model.named_modules() if isinstance(module, Transformer2DModel)]
    return [AttentionGroup(owner, read, self_attention_layers(model, owner)) for owner in owners]


def token_box(pipe: Any, model: UNet2DConditionModel) -> TokenBox:
    """Return the token size of the self-attention with the highest resolution."""
    blocks = model.config.down_block_types
    first = next((i for i, kind in enumerate(blocks) if "Attn" in kind), len(blocks) - 1)
    side = pipe.vae_scale_factor * 2**first
    return TokenBox((side, side), (math.lcm(8, pipe.vae_scale_factor),) * 2)
