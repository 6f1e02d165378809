"""Flux.1 (dev, schnell, Fill, Kontext …): joint attention over [text, image, reference images] in each block."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from dit_accel.common.attention_group import AttentionGroup, TokenBox, self_attention_layers
from dit_accel.common.position_ids import first_raster_grid, raster_grids
from dit_accel.layout import TokenLayout

MODELS = (FluxTransformer2DModel,)


def read(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Read the grid from ``img_ids`` (N, 3): image index, row, column; references have other image indices."""
    ids: Tensor = arguments["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids  # (B, N, 3) is deprecated in diffusers, but still supported
    text = arguments["encoder_hidden_states"].shape[1]
    if torch.compiler.is_compiling():  # the ids are data: an operator in the graph returns the grid as symbolic ints
        rows, columns = first_raster_grid(ids)
        return TokenLayout((rows, columns), before=text, after=ids.shape[0] - rows * columns)
    image, *references = raster_grids(ids)
    after = sum(rows * columns for rows, columns in references)
    return TokenLayout(image, before=text, after=after, references=tuple(references))


def attention_groups(model: nn.Module) -> list[AttentionGroup]:
    return [AttentionGroup("", read, self_attention_layers(model))]


def token_box(pipe: Any, model: FluxTransformer2DModel) -> TokenBox:
    side = pipe.vae_scale_factor * 2  # 2×2 latents are packed into one token
    return TokenBox((side, side), (side, side))
