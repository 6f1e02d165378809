"""Untrained components of the embedded pipelines: diffusers and transformers classes in small sizes.

The two configurations hold all sizes and training options.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from dit_accel.demo.scenes.render import CLIP_FRAMES, CLIP_SIZE, IMAGE_SIZE
from dit_accel.demo.scenes.scene import TEXT_LENGTH
from dit_accel.demo.scenes.vocabulary import build_clip_tokenizer, build_t5_tokenizer, neutral_ids

MAX_BYTES = 8 * 2**20
DEFAULTS_FILE = "defaults.json"


@dataclass(frozen=True)
class Phase:
    """Phase of the denoiser's training: `share` of the time at `size` pixels with noise levels shifted by `shift`."""

    share: float
    size: int
    batch: int
    shift: float


@dataclass
class ImageConfig:
    """FluxPipeline: 512×512 pixels, downsampled by 4 and packed by 2 to 64×64 = 4,096 tokens."""

    size: int = IMAGE_SIZE
    steps: int = 10
    shift: float = 3.0
    heads: int = 2
    head_dim: int = 64
    double_blocks: int = 2
    single_blocks: int = 7
    rope_axes: tuple[int, int, int] = (16, 24, 24)
    text_dim: int = 96
    text_layers: int = 2
    latent_channels: int = 4
    vae_channels: tuple[int, ...] = (16, 32, 64)
    # training
    text_share: float = 0.07
    vae_share: float = 0.28
    vae_batch: int = 32
    vae_lr: float = 2e-3
    phases: tuple[Phase, ...] = (
        Phase(0.15, 128, 128, 1.0),
        Phase(0.35, 256, 64, 1.7),
        Phase(0.50, 512, 24, 3.0),
    )
    resume_phases: tuple[Phase, ...] = (Phase(1.0, 512, 24, 3.0),)
    lr: float = 1.5e-3
    text_lr: float = 3e-4
    weight_decay: float = 0.01
    ema: float = 0.998
    reuse: int = 2
    pool_batches: int = 256
    first_batches: int = 16
    caption_dropout: float = 0.0
    long_text_every: int = 12
    frames: int = 0

    @property
    def token_side(self) -> int:
        return self.size // 8


@dataclass
class VideoConfig:
    """WanPipeline: 25 frames of 256×256, downsampled by (2, 8, 8), patch size (1, 2, 2): 13×16×16 = 3,328 tokens."""

    size: int = CLIP_SIZE
    frames: int = CLIP_FRAMES
    steps: int = 10
    shift: float = 3.0
    heads: int = 2
    head_dim: int = 64
    blocks: int = 10
    text_dim: int = 96
    text_layers: int = 2
    latent_channels: int = 12
    vae_dim: int = 16
    vae_decoder_dim: int = 16
    vae_mult: tuple[int, ...] = (1, 2, 2)
    # training
    text_share: float = 0.07
    vae_share: float = 0.34
    vae_batch: int = 16
    vae_lr: float = 2e-3
    phases: tuple[Phase, ...] = (
        Phase(0.5, 128, 64, 1.7),
        Phase(0.5, 256, 16, 3.0),
    )
    resume_phases: tuple[Phase, ...] = (
        Phase(0.35, 128, 64, 1.7),  # six times the clips per second: most of the text conditioning is learned here
        Phase(0.65, 256, 16, 3.0),
    )
    lr: float = 1.5e-3
    text_lr: float = 3e-4
    weight_decay: float = 0.01
    ema: float = 0.998
    reuse: int = 12
    pool_batches: int = 1024
    first_batches: int = 16
    caption_dropout: float = 0.1
    long_text_every: int = 12

    @property
    def token_side(self) -> int:
        return self.size // 16


Config = ImageConfig | VideoConfig


def smoke_config(kind: str) -> Config:
    """Configuration for a run of a few seconds on a CPU."""
    if kind == "image":
        phases = (Phase(0.5, 64, 4, 1.0), Phase(0.5, 128, 2, 2.0))
        return ImageConfig(
            size=128, steps=2, double_blocks=1, single_blocks=1, vae_batch=2, phases=phases, resume_phases=phases
        )
    phases = (Phase(0.5, 32, 2, 1.0), Phase(0.5, 64, 2, 2.0))
    return VideoConfig(size=64, frames=9, steps=2, blocks=2, vae_batch=2, phases=phases, resume_phases=phases)


def _encoder_sizes(config: Config, vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "d_model": config.text_dim,
        "d_kv": 32,
        "num_heads": config.text_dim // 32,
        "d_ff": 2 * config.text_dim,
        "num_layers": config.text_layers,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 64,
    }


def build_image_pipeline(config: ImageConfig) -> FluxPipeline:
    """Build a FluxPipeline with random weights."""
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(), build_t5_tokenizer()
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=config.text_dim,
            intermediate_size=2 * config.text_dim,
            projection_dim=config.text_dim,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_dim // 32,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(T5Config(**_encoder_sizes(config, len(t5_tokenizer))))
    _zero_embeddings(clip.get_input_embeddings(), neutral_ids(clip_tokenizer))
    _zero_embeddings(t5.get_input_embeddings(), neutral_ids(t5_tokenizer))
    depth = len(config.vae_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=config.vae_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=config.size,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )
    transformer = FluxTransformer2DModel(
        in_channels=4 * config.latent_channels,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=config.text_dim,
        pooled_projection_dim=config.text_dim,
        axes_dims_rope=config.rope_axes,
    )
    start_as_identity(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=config.shift)
    return FluxPipeline(scheduler, vae, clip, clip_tokenizer, t5, t5_tokenizer, transformer)


def build_video_pipeline(config: VideoConfig) -> WanPipeline:
    """Build a WanPipeline with random weights."""
    tokenizer = build_t5_tokenizer()
    t5 = UMT5EncoderModel(UMT5Config(**_encoder_sizes(config, len(tokenizer))))
    _zero_embeddings(t5.get_input_embeddings(), neutral_ids(tokenizer))
    vae = AutoencoderKLWan(
        base_dim=config.vae_dim,
        decoder_base_dim=config.vae_decoder_dim,
        z_dim=config.latent_channels,
        dim_mult=list(config.vae_mult),
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * config.latent_channels,
        latents_std=[1.0] * config.latent_channels,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=2,
        scale_factor_spatial=8,
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        text_dim=config.text_dim,
        ffn_dim=4 * config.heads * config.head_dim,
        num_layers=config.blocks,
        rope_max_seq_len=128,
    )
    start_as_identity(transformer)
    return WanPipeline(tokenizer, t5, vae, FlowMatchEulerDiscreteScheduler(shift=config.shift), transformer)


def start_as_identity(transformer: torch.nn.Module) -> None:
    """Zero the modulation and output layers, so that each block is initially the identity (DiT's adaLN-zero)."""
    for name, module in transformer.named_modules():
        modulates = isinstance(module, torch.nn.Linear) and ("norm" in name or name.endswith("time_proj"))
        if modulates or name == "proj_out":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for name, parameter in transformer.named_parameters():
        if name.endswith("scale_shift_table"):
            torch.nn.init.zeros_(parameter)


def _zero_embeddings(embedding: torch.nn.Embedding, ids: list[int]) -> None:
    with torch.no_grad():
        embedding.weight[ids] = 0.0


def call_defaults(config: Config) -> dict[str, Any]:
    """Default arguments of the pipeline's call, written as `defaults.json` to its folder."""
    common = {"num_inference_steps": config.steps, "max_sequence_length": TEXT_LENGTH}
    size = {"height": config.size, "width": config.size}
    if isinstance(config, VideoConfig):
        return {**size, "num_frames": config.frames, "guidance_scale": 3.0, **common}
    return {**size, **common}


def folder_bytes(folder: str | Path) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def save_pipeline(
    pipe: DiffusionPipeline, folder: str | Path, config: Config, max_bytes: int | None = MAX_BYTES
) -> int:
    """Write the pipeline in half precision, atomically, and return its size in bytes.

    Raises: ValueError: the size is above ``max_bytes``, by default the limit of the embedded pipelines.
    """
    target = Path(folder).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        pipe.save_pretrained(staging)
        for weights in staging.rglob("*.safetensors"):
            _convert_to_half(weights)
        for config_file in staging.rglob("*.json"):
            _remove_origin(config_file)
        (staging / DEFAULTS_FILE).write_text(json.dumps(call_defaults(config), indent=2) + "\n")
        (staging / "training.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        size = folder_bytes(staging)
        if max_bytes is not None and size > max_bytes:
            raise ValueError(
                f"expected at most {max_bytes:,} bytes for the pipeline, got {size:,}: make its components smaller"
            )
        old = target.with_name(f".{target.name}-old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(staging, target)
        shutil.rmtree(old, ignore_errors=True)
        return size
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_origin(path: Path) -> None:
    """Remove the path from which a resumed pipeline was loaded."""
    content = json.loads(path.read_text())
    kept = {k: v for k, v in content.items() if k not in ("_name_or_path", "is_local", "local_files_only")}
    if kept != content:
        path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def _convert_to_half(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: value.half().contiguous() for name, value in load_file(path).items()}, path, {"format": "pt"})
