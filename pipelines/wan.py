"""Wan 2.1 and 2.2 (text-, image-to-video, VACE): self-attention over the video, cross-attention to text and image."""

import math
from collections.abc import Mapping
from typing import Any

from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch import nn

from dit_accel.common.attention_group import AttentionGroup, TokenBox, self_attention_layers
from dit_accel.layout import TokenLayout

MODELS = (WanTransformer3DModel, WanVACETransformer3DModel)


def read(model: WanTransformer3DModel, arguments: Mapping[str, Any]) -> TokenLayout:
    lengths = arguments["hidden_states"].shape[2:]  # (B, C, F, H, W)
    return TokenLayout(tuple(n // p for n, p in zip(lengths, model.config.patch_size, strict=True)))


def attention_groups(model: nn.Module) -> list[AttentionGroup]:
    return [AttentionGroup("", read, [name for name in self_attention_layers(model) if name.endswith("attn1")])]


def token_box(pipe: Any, model: WanTransformer3DModel) -> TokenBox:
    patch_frames, *patch = model.config.patch_size
    rows, columns = (pipe.vae_scale_factor_spatial * n for n in patch)
    multiple = (math.lcm(16, rows), math.lcm(16, columns))  # Wan's pipelines require multiples of 16 for every VAE
    return TokenBox((rows, columns), multiple, pipe.vae_scale_factor_temporal, patch_frames)
