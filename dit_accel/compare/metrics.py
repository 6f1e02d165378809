"""How far a picture or clip is from another: PSNR, SSIM, and LPIPS where its weights are on this machine; and how near
to its prompt: CLIP score, likewise."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

__all__ = ["clip_score", "clip_weights", "compare_frames", "lpips_weights"]

Frames = NDArray[np.uint8]  # (T, H, W, 3)
_SSIM_KERNEL = 11
_CLIP = "openai/clip-vit-base-patch16"


def compare_frames(frames: Frames, baseline: Frames) -> dict[str, float | None]:
    """PSNR in dB, SSIM and LPIPS (AlexNet) of 8-bit frames, averaged over the frames.

    None for what cannot be told: PSNR of equal frames (it is infinite), SSIM of frames smaller than its window, LPIPS
    without weights.

    Args:
        frames, baseline: (T, H, W, 3) uint8.
    Returns: ``{"psnr", "ssim", "lpips"}``.
    Raises: ValueError: frames of different shapes.
    """
    if frames.shape != baseline.shape:
        raise ValueError(f"frames of shape {frames.shape} cannot be compared with the baseline's {baseline.shape}")
    pairs = [(_to_tensor(a), _to_tensor(b)) for a, b in zip(frames, baseline, strict=True)]
    return {
        "psnr": _mean([_psnr(a, b) for a, b in pairs]),
        "ssim": _mean([_ssim(a, b) for a, b in pairs]),
        "lpips": _mean([_lpips(a, b) for a, b in pairs]) if lpips_weights() else None,
    }


def lpips_weights() -> Path | None:
    """AlexNet's weights as torchvision keeps them, if torchvision and they are there. Nothing is ever downloaded."""
    try:
        from torchvision.models import AlexNet_Weights
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision of another torch build
        return None
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(AlexNet_Weights.DEFAULT.url).name
    return file if file.is_file() else None


def clip_score(frames: Frames, prompt: str) -> float | None:
    """100 times the cosine between prompt and picture in CLIP (ViT-B/16), averaged over the frames; None without its
    weights. [CLIPScore, arXiv 2104.08718, w = 100]

    Args:
        frames: (T, H, W, 3) uint8.
    """
    folder = clip_weights()
    if folder is None:
        return None
    model, processor = _clip_model(folder)  # torchmetrics' own does not run with transformers 5
    pictures = [Image.fromarray(frame) for frame in frames]
    given = processor(text=[prompt], images=pictures, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        found = model(**given)
    return 100 * max(0.0, float((found.image_embeds @ found.text_embeds[0]).mean()))


@functools.lru_cache(maxsize=1)
def _clip_model(folder: Path) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    return CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)


def clip_weights() -> Path | None:
    """The folder where the Hugging Face hub's cache has CLIP ViT-B/16, if it has. Nothing is ever downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(_CLIP, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")) else None


def _to_tensor(frame: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float() / 255


def _mean(values: list[float]) -> float | None:
    """Mean of the values that are finite; None if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _psnr(frame: Tensor, baseline: Tensor) -> float:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(frame, baseline, data_range=1.0))


def _ssim(frame: Tensor, baseline: Tensor) -> float:
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(frame.shape[-2:]) < _SSIM_KERNEL:
        return math.nan
    score = structural_similarity_index_measure(frame, baseline, data_range=1.0, kernel_size=_SSIM_KERNEL)
    assert isinstance(score, Tensor)
    return float(score)


@functools.lru_cache(maxsize=1)
def _lpips_model() -> torch.nn.Module:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)


def _lpips(frame: Tensor, baseline: Tensor) -> float:
    with torch.no_grad():
        return float(_lpips_model()(frame, baseline))
