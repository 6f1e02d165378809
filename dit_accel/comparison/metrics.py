"""Image metrics: PSNR and SSIM, and LPIPS and CLIP score if their weights are on this machine."""

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

    None if undefined: PSNR of equal frames (infinite), SSIM of frames smaller than its window, LPIPS without weights.

    Args:
        frames, baseline: (T, H, W, 3) uint8.
    Returns: ``{"psnr", "ssim", "lpips"}``.
    Raises: ValueError: the shapes differ.
    """
    if frames.shape != baseline.shape:
        raise ValueError(f"frames of shape {frames.shape} cannot be compared with a baseline of shape {baseline.shape}")
    pairs = [(_to_tensor(a), _to_tensor(b)) for a, b in zip(frames, baseline, strict=True)]
    return {
        "psnr": _mean([_psnr(a, b) for a, b in pairs]),
        "ssim": _mean([_ssim(a, b) for a, b in pairs]),
        "lpips": _mean([_lpips(a, b) for a, b in pairs]) if lpips_weights() else None,
    }


def lpips_weights() -> Path | None:
    """File of AlexNet's weights in torchvision's cache; None if either is missing. Never downloads anything."""
    try:
        from torchvision.models import AlexNet_Weights
    except (ImportError, RuntimeError):  # RuntimeError: torchvision was built for another torch
        return None
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(AlexNet_Weights.DEFAULT.url).name
    return file if file.is_file() else None


def clip_score(frames: Frames, prompt: str) -> float | None:
    """CLIP score: 100 × cosine of prompt and picture in CLIP ViT-B/16, averaged over the frames; None without weights.
    [CLIPScore, arXiv 2104.08718, w = 100]

    Args:
        frames: (T, H, W, 3) uint8.
    """
    folder = clip_weights()
    if folder is None:
        return None
    model, processor = _clip_model(folder)  # torchmetrics' implementation fails with transformers 5
    pictures = [Image.fromarray(frame) for frame in frames]
    inputs = processor(text=[prompt], images=pictures, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        output = model(**inputs)
    return 100 * max(0.0, float((output.image_embeds @ output.text_embeds[0]).mean()))


@functools.lru_cache(maxsize=1)
def _clip_model(folder: Path) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    return CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)


def clip_weights() -> Path | None:
    """Folder of CLIP ViT-B/16 in the Hugging Face cache; None if it is missing. Never downloads anything."""
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
    """Mean of the finite values; None if there are none."""
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
