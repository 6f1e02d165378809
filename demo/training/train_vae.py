"""Train the autoencoders of the embedded pipelines, and normalise their latents."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, DiffusionPipeline
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanDecoder3d,
    WanEncoder3d,
    WanResample,
    patchify,
    unpatchify,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from dit_accel.demo.scenes.render import render
from dit_accel.demo.training.batches import SceneStream, half_precision
from dit_accel.demo.training.build import Config, ImageConfig

KL_WEIGHT = 3e-4
EDGE_WEIGHT = 0.5
SQUARE_WEIGHT = 2.0


def draw(stream: SceneStream, config: Config, count: int, size: int, frames: int | None = None) -> torch.Tensor:
    """Render pictures or clips of `count` new scenes."""
    batch = stream.next(count)
    return render(batch.rows, batch.backgrounds, size, clip_times(config, stream.device, frames))


def clip_times(config: Config, device: torch.device, frames: int | None = None) -> torch.Tensor | None:
    """Times of a clip's frames in 0…1: `frames` consecutive ones at random, or all; None for pictures."""
    if not config.frames:
        return None
    moments = torch.linspace(0, 1, config.frames, device=device)
    if frames is None:
        return moments
    start = int(torch.randint(0, config.frames - frames + 1, ()))
    return moments[start : start + frames]


def _resample_all_frames(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    if layer.mode == "upsample3d":
        first, rest = x[:, :, :1], x[:, :, 1:]
        if rest.shape[2]:
            pairs = layer.time_conv(rest).unflatten(1, (2, -1))
            rest = torch.stack(pairs.unbind(1), 3).flatten(2, 3)
        x = torch.cat([first, rest], 2)
    batch, _, length = x.shape[:3]
    x = layer.resample(x.transpose(1, 2).flatten(0, 1))
    x = x.unflatten(0, (batch, length)).transpose(1, 2)
    if layer.mode == "downsample3d" and length > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], 2)
    return x


def _apply_layers(layers: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = _resample_all_frames(layer, x) if isinstance(layer, WanResample) else layer(x)
    return x


def encode_clip(vae: AutoencoderKLWan, clip: torch.Tensor) -> DiagonalGaussianDistribution:
    """Posterior of `vae.encode`, all frames at once instead of in cached chunks: the same values, much faster."""
    encoder: WanEncoder3d = vae.encoder
    x = encoder.conv_in(patchify(clip, vae.config.patch_size))
    x = encoder.mid_block(_apply_layers(encoder.down_blocks, x))
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(x)))
    return DiagonalGaussianDistribution(vae.quant_conv(x))


def decode_clip(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Output of `vae.decode` before the clamp, all frames at once."""
    decoder: WanDecoder3d = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        x = _apply_layers([*block.resnets, *(block.upsamplers or [])], x)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return unpatchify(x, vae.config.patch_size)


def encode(vae: nn.Module, pixels: torch.Tensor) -> DiagonalGaussianDistribution:
    return vae.encode(pixels).latent_dist if isinstance(vae, AutoencoderKL) else encode_clip(vae, pixels)


def decode(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    return vae.decode(latents).sample if isinstance(vae, AutoencoderKL) else decode_clip(vae, latents)


def _next_pixels(stream: SceneStream, config: Config, progress: float, step: int) -> torch.Tensor:
    """Batch of small crops of pictures at half and full size; in the last 30 % of the time also whole pictures."""
    if progress > 0.7 and step % 4 == 0:
        return draw(stream, config, max(1, config.vae_batch // 8), config.size)
    pixels = draw(stream, config, config.vae_batch, config.size // (1 + step % 2), 9 if config.frames else None)
    side = config.size // 4
    places = (pixels.shape[-1] - side) // 16 + 1
    top, left = (int(i) for i in torch.randint(0, places, (2,)) * 16)
    return pixels[..., top : top + side, left : left + side]


def _edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def train_vae(
    pipe: DiffusionPipeline, config: Config, stream: SceneStream, deadline: float, log: Callable[..., None]
) -> None:
    """Train until `deadline`, then normalise the latents."""
    vae, device = pipe.vae, stream.device
    if device.type == "cuda" and isinstance(config, ImageConfig):
        vae.to(memory_format=torch.channels_last)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.vae_lr, betas=(0.9, 0.99), weight_decay=1e-4)
    averaged = [p.detach().clone() for p in parameters]
    start_time, step = time.monotonic(), 0
    while step == 0 or time.monotonic() < deadline:
        progress = min(1.0, (time.monotonic() - start_time) / max(1e-3, deadline - start_time))
        ramp = min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress) + 0.01)
        optimizer.param_groups[0]["lr"] = config.vae_lr * ramp
        pixels = _next_pixels(stream, config, progress, step)
        with half_precision(device):
            posterior = encode(vae, pixels)
            mean, log_variance = posterior.mean.float(), posterior.logvar.float()
            latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            decoded = decode(vae, latents).float()
        error = decoded - pixels
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        edge = sum((a - b).abs().mean() for a, b in zip(_edges(decoded), _edges(pixels), strict=True))
        loss = error.abs().mean() + SQUARE_WEIGHT * error.square().mean() + EDGE_WEIGHT * edge + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], max(0.005, 1 / (step + 1)))
        step += 1
        if step % 10 == 0 or device.type != "cuda":
            psnr = 10 * torch.log10(4 / error.detach().square().mean())
            log(f"vae step {step} loss {loss.item():.4f} psnr {psnr.item():.1f} dB kl {kl.item():.2f}")
    with torch.no_grad():
        for parameter, value in zip(parameters, averaged, strict=True):
            parameter.copy_(value)
    normalise_latents(pipe, config, stream)


@torch.no_grad()
def normalise_latents(pipe: DiffusionPipeline, config: Config, stream: SceneStream) -> None:
    """Normalise each latent channel to zero mean and unit variance over rendered data.

    For pictures, the normalisation is folded into the 1×1 convolutions before and after the latents. For clips, it is
    stored in `latents_mean` and `latents_std`.
    """
    vae, latents = pipe.vae, []
    for _ in range(16):
        latents.append(encode(vae, draw(stream, config, max(2, config.vae_batch // 4), config.size)).mean)
    flat = torch.cat(latents).transpose(0, 1).flatten(1).double()
    mean, std = flat.mean(1), flat.std(1)
    if isinstance(vae, AutoencoderKLWan):
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        return
    count = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    mean, std = mean.float(), std.float()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]
    before.weight[:count] /= std[:, None, None, None]
    before.bias[:count] = (before.bias[:count] - mean) / std
    before.bias[count:] -= 2 * std.log()


@torch.no_grad()
def measure_psnr(pipe: DiffusionPipeline, pixels: torch.Tensor) -> list[float]:
    """PSNR in dB of encoding and decoding with the pipeline, for each picture or clip in -1…1."""
    values = []
    for each in pixels.split(1):
        decoded = pipe.vae.decode(pipe.vae.encode(each).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(float(10 * torch.log10(4 / (decoded - each).square().mean())))
    return values
