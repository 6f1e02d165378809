"""The token grid computed from a picture size is the grid of the denoiser's layers, for every family."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from tiny import TINY

from dit_accel import GNAAttnProcessor, attention
from dit_accel.comparison.sizes import Size, check_size, default_size, token_grid
from dit_accel.install.installation import denoisers, installed_layers


def vae() -> AutoencoderKL:
    """A tiny VAE with a scale factor of 2."""
    return AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def sd15():
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, unet=TINY["sd15"](), safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), requires_safety_checker=False,
    )  # fmt: skip


def sdxl():
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=TINY["sdxl"](),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), add_watermarker=False,
    )  # fmt: skip


def sd3():
    return StableDiffusion3Pipeline(
        vae=vae(), text_encoder=None, text_encoder_2=None, text_encoder_3=None, tokenizer=None, tokenizer_2=None,
        tokenizer_3=None, transformer=TINY["sd3"](), scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


PIPELINES = {
    "sd15": (sd15, {}, Size(16, 24), Size(16, 16)),
    "sdxl": (sdxl, {"pooled_prompt_embeds": torch.zeros(1, 12)}, Size(16, 24), Size(16, 16)),
    "sd3": (sd3, {"pooled_prompt_embeds": torch.zeros(1, 12)}, Size(20, 28), Size(32, 32)),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_token_grid_is_the_finest_in_the_denoiser(name):
    build, extra, size, _ = PIPELINES[name]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    check_size(pipe, size)
    with attention(pipe, GNAAttnProcessor(window=2)):
        pipe(
            prompt_embeds=torch.randn(1, 7, 24), height=size.height, width=size.width, num_inference_steps=1,
            guidance_scale=1.0, output_type="latent", **extra,
        )  # fmt: skip
        layers = installed_layers(next(iter(denoisers(pipe).values()))).values()
        grids = {layer.slot.last.grid for layer in layers}
    assert max(grids) == token_grid(pipe, size)


@pytest.mark.parametrize("name", PIPELINES)
def test_default_size_is_the_pipelines_own(name):
    build, _, _, default = PIPELINES[name]
    assert default_size(build()) == default


@pytest.mark.parametrize("name", PIPELINES)
def test_invalid_sizes_are_rejected_with_the_nearest(name):
    build, _, size, _ = PIPELINES[name]
    with pytest.raises(ValueError, match=f"nearest: {size.height}×{size.width} or"):
        check_size(build(), Size(size.height + 1, size.width))
