"""Stable Diffusion 3 and 3.5: joint attention over [image, text]; dual blocks have a second one over the image."""

from collections.abc import Mapping
from typing import Any

from diffusers import SD3Transformer2DModel
from torch import nn

from dit_accel.common.attention_group import AttentionGroup, TokenBox, self_attention_layers
from dit_accel.layout import TokenLayout

MODELS = (SD3Transformer2DModel,)


def read_image(model: SD3Transformer2DModel, arguments: Mapping[str, Any]) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]  # (B, C, H, W)
    return TokenLayout((height // model.config.patch_size, width // model.config.patch_size))


def read_joint(model: SD3Transformer2DModel, arguments: Mapping[str, Any]) -> TokenLayout:
    return TokenLayout(read_image(model, arguments).grid, after=arguments["encoder_hidden_states"].shape[1])


def attention_groups(model: nn.Module) -> list[AttentionGroup]:
    layers = self_attention_layers(model)
    joint = [name for name in layers if name.endswith(".attn")]
    image = [name for name in layers if name.endswith(".attn2")]
    return [AttentionGroup("", read_joint, joint), AttentionGroup("", read_image, image)]


def token_box(pipe: Any, model: SD3Transformer2DModel) -> TokenBox:
    side = pipe.vae_scale_factor * model.config.patch_size
    return TokenBox((side, side), (side, side))
