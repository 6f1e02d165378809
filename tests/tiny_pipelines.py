"""Folders with tiny random pipelines of diffusers' and transformers' classes that generate within a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from tiny import flux, sd3, sd15, sdxl, wan
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ("a", "red", "green", "circle", "square", "moving")


def clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(set("".join(WORDS)))
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


def t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *(("▁" + word, -1.0) for word in WORDS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=16)


def t5_sizes(width: int) -> dict[str, int]:
    return {"vocab_size": 3 + len(WORDS), "d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def tiny_vae(channels: int, **options: Any) -> AutoencoderKL:
    """Return a VAE that halves height and width; ``options``: latent scale and quantizing convolutions."""
    return AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=channels, norm_num_groups=4, layers_per_block=1, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **options,
    )  # fmt: skip


def save_flux(folder: Path) -> Path:
    """Save a FluxPipeline; sizes are multiples of 4, by default 32×32 with 8×8 tokens."""
    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=64, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vae = tiny_vae(1, shift_factor=0.0, scaling_factor=1.0, use_quant_conv=False, use_post_quant_conv=False)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=CLIPTextModel(clip),
        tokenizer=clip_tokenizer(), text_encoder_2=T5EncoderModel(T5Config(**t5_sizes(24))),
        tokenizer_2=t5_tokenizer(), transformer=flux(),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def save_wan(folder: Path) -> Path:
    """Save a WanPipeline with Wan's 8×8×4 compression; sizes are multiples of 16, frames 4n + 1."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    pipe = WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=UMT5EncoderModel(UMT5Config(**t5_sizes(24))), vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=wan(),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def save_sd(folder: Path, prediction: str = "v_prediction") -> Path:
    """Save a StableDiffusionPipeline; sizes are multiples of 8, with 16×16 latents for 32×32."""
    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=64, hidden_size=24, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vae = tiny_vae(4, scaling_factor=0.2)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(clip), tokenizer=clip_tokenizer(), unet=sd15(),
        scheduler=DDIMScheduler(prediction_type=prediction, clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def projecting_clip() -> dict[str, int]:
    return {
        "vocab_size": 64, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip


def save_sdxl(folder: Path) -> Path:
    """Save a StableDiffusionXLPipeline with epsilon prediction; sizes are multiples of 8, 16×16 latents for 32×32."""
    torch.manual_seed(0)
    vae = tiny_vae(4, scaling_factor=0.13)
    pipe = StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(CLIPTextConfig(**projecting_clip())), tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**projecting_clip(), projection_dim=12)),
        tokenizer_2=clip_tokenizer(), unet=sdxl(), scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def save_sd3(folder: Path) -> Path:
    """Save a StableDiffusion3Pipeline; sizes are multiples of 4, with 8×8 tokens for 32×32."""
    torch.manual_seed(0)
    vae = tiny_vae(4, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False)
    clip = [CLIPTextModelWithProjection(CLIPTextConfig(**projecting_clip(), projection_dim=6)) for _ in range(2)]
    pipe = StableDiffusion3Pipeline(
        vae=vae, text_encoder=clip[0], tokenizer=clip_tokenizer(), text_encoder_2=clip[1], tokenizer_2=clip_tokenizer(),
        text_encoder_3=T5EncoderModel(T5Config(**t5_sizes(24))), tokenizer_3=t5_tokenizer(), transformer=sd3(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder
