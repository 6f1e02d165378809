"""Tiny random denoisers of each family, built from diffusers' classes, with inputs of uneven sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch import Tensor, nn

TEXT = 7


@dataclass(frozen=True)
class Tiny:
    """Denoiser, its forward arguments for a grid, and its properties."""

    build: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, Any]]
    size: tuple[int, ...]  # the default grid of tokens
    other_size: tuple[int, ...]
    layers: int  # self-attention layers
    block: str | None  # class of the repeated blocks

    def __call__(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.build().eval()
        with torch.no_grad():  # with zero-initialised output layers, all outputs would be equal
            for parameter in model.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    parameter.normal_(std=0.1)
        return model


def position_ids(height: int, width: int, image: int = 0) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, image), rows, columns], -1).reshape(-1, 3).float()


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def flux_inputs(size: tuple[int, ...], batch: int = 2, references: tuple[tuple[int, int], ...] = ()) -> dict[str, Any]:
    ids = torch.cat([position_ids(*size), *(position_ids(*ref, image=i + 1) for i, ref in enumerate(references))])
    return {
        "hidden_states": torch.randn(batch, len(ids), 4),
        "encoder_hidden_states": torch.randn(batch, TEXT, 24),
        "pooled_projections": torch.randn(batch, 12),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip


def sd3_inputs(size: tuple[int, ...], batch: int = 2) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2 * size[0], 2 * size[1]),
        "encoder_hidden_states": torch.randn(batch, TEXT, 24),
        "pooled_projections": torch.randn(batch, 12),
        "timestep": torch.full((batch,), 500.0),
    }


def sd15() -> nn.Module:
    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip


def sdxl() -> nn.Module:
    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), norm_num_groups=8,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
    )  # fmt: skip


def unet_inputs(size: tuple[int, ...], batch: int = 2, text: int = TEXT) -> dict[str, Any]:
    return {
        "sample": torch.randn(batch, 4, *size),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(batch, text, 24),
    }


def sdxl_inputs(size: tuple[int, ...], batch: int = 2) -> dict[str, Any]:
    added = {"text_embeds": torch.randn(batch, 12), "time_ids": torch.arange(6.0).repeat(batch, 1)}
    return {**unet_inputs((2 * size[0], 2 * size[1]), batch), "added_cond_kwargs": added}


_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
    "text_dim": 24, "freq_dim": 32, "ffn_dim": 48, "num_layers": 2, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
}  # fmt: skip


def wan() -> nn.Module:
    return WanTransformer3DModel(**_WAN)


def wan_i2v() -> nn.Module:
    return WanTransformer3DModel(**_WAN, image_dim=20, added_kv_proj_dim=32)


def wan_vace() -> nn.Module:
    return WanVACETransformer3DModel(**_WAN, vace_layers=[0, 1], vace_in_channels=6)


def wan_inputs(size: tuple[int, ...], batch: int = 2, text: int = TEXT) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, size[0], 2 * size[1], 2 * size[2]),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, text, 24),
    }


def wan_i2v_inputs(size: tuple[int, ...], batch: int = 2) -> dict[str, Any]:
    return {**wan_inputs(size, batch, text=512), "encoder_hidden_states_image": torch.randn(batch, 5, 20)}


def wan_vace_inputs(size: tuple[int, ...], batch: int = 2) -> dict[str, Any]:
    given = wan_inputs(size, batch)
    given["control_hidden_states"] = torch.randn(batch, 6, *given["hidden_states"].shape[2:])
    return {**given, "control_hidden_states_scale": torch.ones(2)}


TINY: dict[str, Tiny] = {
    "flux": Tiny(flux, flux_inputs, (7, 10), (10, 7), 4, "FluxTransformerBlock"),
    "sd3": Tiny(sd3, sd3_inputs, (7, 10), (10, 7), 5, None),
    "sd15": Tiny(sd15, unet_inputs, (10, 14), (14, 10), 4, "BasicTransformerBlock"),
    "sdxl": Tiny(sdxl, sdxl_inputs, (6, 9), (9, 6), 8, "BasicTransformerBlock"),
    "wan": Tiny(wan, wan_inputs, (3, 5, 6), (5, 3, 6), 2, "WanTransformerBlock"),
    "wan_i2v": Tiny(wan_i2v, wan_i2v_inputs, (3, 5, 6), (5, 3, 6), 2, "WanTransformerBlock"),
    "wan_vace": Tiny(wan_vace, wan_vace_inputs, (3, 5, 6), (5, 3, 6), 4, "WanTransformerBlock"),
}


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return the denoiser's output for these inputs; ``**`` copies the outer dict, which some models change."""
    return model(**inputs, return_dict=False)[0]
